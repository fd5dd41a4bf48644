"""A clear error for losses without a forward-mode derivative.

JAX's own says "custom_vjp function", which is not what the caller called.
"""

import functools
from collections.abc import Callable
from typing import Any


def reverse_mode_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """Replace JAX's error for ``jax.jvp`` of a ``custom_vjp`` function.

    Args:
      function: with a custom reverse-mode derivative.

    Returns:
      The same function. Under an outer ``jax.jit`` the error comes later, from
      the compiler, and is JAX's own.

    Raises:
      TypeError: where a forward-mode derivative is taken.
    """

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise TypeError(
                "the fused losses have a reverse-mode derivative only; take "
                "jax.grad, jax.vjp or jax.jacrev, or for jax.jvp and "
                "jax.jacfwd the dense loss, "
                "reverse_kl(log_softmax(logits), log_softmax(teacher_logits))"
            ) from error

    return call
