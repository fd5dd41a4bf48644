"""The interface of a model, and any pure function as a model.

Rollouts, branches, scoring, updates and statistics call a model and read a few
of its attributes: :class:`LanguageModel` is the whole list. The decoder of this
project has them. :func:`from_function` gives them to any function
``(params, tokens, positions, mask, cache) -> (hidden, cache)``: a Flax module,
another library's model, a few lines of ``jax.numpy``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from flax.core import FrozenDict

from topd_jax.models.attention.cache import update_slice
from topd_jax.parallel.sharding import constrain, parameter_name
from topd_jax.types import Head, head_rows

Apply = Callable[..., tuple[jax.Array, Any]]
Select = Callable[[Any], Head]


class LanguageModel(Protocol):
    """The interface of a student or a teacher, which is also a pytree.

    Leaves are arrays. Those of a student are floating, since they are
    differentiated; those of a teacher may be of any type.

    Attributes:
      head: [V, D] output head, an array or a
        :class:`~topd_jax.types.CappedHead`; V may differ between student and
        teacher (the shared ids count), and so may D.
      embedding: [V, E] the space of the transport cost; needed of a student
        whose objective looks ahead.
      logical_axes: parameter name -> logical axes, for a mesh; parameters
        without a name in it are replicated. See
        :func:`~topd_jax.parallel.sharding.tree_shardings`.
    """

    head: Any
    embedding: Any
    logical_axes: Mapping[str, Sequence[str | None]]

    def init_cache(self, batch: int, length: int) -> Any:
        """Make an empty cache: any pytree whose structure calls do not change.

        Which dimensions are rows and tokens is told from how the shapes
        follow the arguments; tokens that are added are zeros behind the others.
        Integer scalars count the tokens that are written: rollouts in slots
        move tokens, and the count with them.

        Args:
          batch: B rows.
          length: L, how many tokens can be written.
        """

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: Any = None,
    ) -> tuple[jax.Array, Any]:
        """Read tokens.

        The mask alone decides what a token attends to: tokens of a cache need
        not be in the order of their positions, and branches of one prefix
        stand side by side. A token attends to itself unless it is padding; a
        row of padding may attend to nothing and must stay finite.

        Args:
          tokens: i32[B, S].
          positions: i32[B, S], 0 at the first existing token of a row.
          mask: bool[B, S, L] keys that each token attends to; L == S without
            a cache, else its length.
          cache: to which the S tokens are appended; None reads the tokens
            alone.

        Returns:
          (hidden [B, S, D], of which ``head`` makes the logits of the next
          token; the cache with S more tokens written, or None).
        """


@struct.dataclass
class TokenCache:
    """The tokens that were read, for a function that keeps no cache.

    Attributes:
      tokens: i32[B, L].
      positions: i32[B, L].
      mask: bool[B, L, L] keys of each token, written or not.
      length: i32[] tokens written so far.
    """

    tokens: jax.Array
    positions: jax.Array
    mask: jax.Array
    length: jax.Array


@struct.dataclass
class FunctionModel:
    """A pure function and its parameters, as a :class:`LanguageModel`.

    Returned by :func:`from_function`. The parameters are the only leaves. The
    functions are static and compared by identity: make a model once, since a
    new lambda compiles everything again.

    Attributes:
      params: any pytree.
      apply: the function.
      select_head: params -> [V, D].
      select_embedding: params -> [V, E], or None for the head's rows.
      make_cache: (batch, length) -> cache, or None to read again.
      logical_axes: parameter name -> logical axes, hashable.
    """

    params: Any
    apply: Apply = struct.field(pytree_node=False)
    select_head: Select = struct.field(pytree_node=False)
    select_embedding: Select | None = struct.field(pytree_node=False)
    make_cache: Callable[[int, int], Any] | None = struct.field(
        pytree_node=False
    )
    logical_axes: FrozenDict = struct.field(pytree_node=False)

    @property
    def head(self) -> Head:
        """Return the output head [V, D]."""
        return self.select_head(self.params)

    @property
    def embedding(self) -> jax.Array:
        """Return the rows [V, E] between which the transport cost is taken."""
        if self.select_embedding is None:
            return head_rows(self.head)
        return self.select_embedding(self.params)

    def init_cache(self, batch: int, length: int) -> Any:
        """Make an empty cache; see :class:`LanguageModel`."""
        if self.make_cache is not None:
            return self.make_cache(batch, length)
        ids = jnp.zeros((batch, length), jnp.int32)
        ids = constrain(ids, "batch", None)
        mask = jnp.zeros((batch, length, length), bool)
        mask = constrain(mask, "batch", None, None)
        return TokenCache(ids, ids, mask, jnp.zeros((), jnp.int32))

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: Any = None,
    ) -> tuple[jax.Array, Any]:
        """Read tokens; see :class:`LanguageModel`."""
        if cache is None:
            mask = _with_itself(mask)
            return self.apply(self.params, tokens, positions, mask, None)
        if self.make_cache is not None:
            return self.apply(self.params, tokens, positions, mask, cache)
        cache = _append(cache, tokens, positions, mask)
        hidden, _ = self.apply(
            self.params, cache.tokens, cache.positions,
            _with_itself(cache.mask), None,
        )  # fmt: skip
        count = tokens.shape[1]
        new = jax.lax.dynamic_slice_in_dim(hidden, cache.length, count, 1)
        return new, cache.replace(length=cache.length + count)


def from_function(
    apply: Apply,
    params: Any,
    *,
    head: Select,
    embedding: Select | None = None,
    init_cache: Callable[[int, int], Any] | None = None,
    logical_axes: Mapping[str, Sequence[str | None]] | None = None,
) -> FunctionModel:
    """Make a student or a teacher of any pure function.

    Without ``init_cache`` the function needs no cache of its own: whatever it
    has read is kept as ids, and all columns are read again at every token,
    each seeing what its mask said. That is exact, and costs a whole reading a
    token: for models that are small, or that only read.

    Args:
      apply: (params, tokens i32[B, S], positions i32[B, S], mask bool[B, S,
        L], cache) -> (hidden [B, S, D], cache), as
        :meth:`LanguageModel.__call__`; without ``init_cache`` it is always
        called with cache None, L == S, and each token attending to itself.
      params: any pytree of arrays.
      head: params -> [V, D] output head.
      embedding: params -> [V, E] for the transport cost; None takes the
        head's rows.
      init_cache: (batch, length) -> the empty cache that ``apply`` writes.
      logical_axes: parameter -> logical axes on a mesh, by attribute name or
        by the end of its path, joined by "/" ("Embed_0/embedding").
        Parameters that are not named are replicated.

    Returns:
      The model.

    Raises:
      ValueError: where head, embedding or what ``apply`` returns has another
        shape, the cache comes back changed in structure, shape or dtype, or
        ``logical_axes`` names what no parameter is.
    """
    axes = {name: tuple(a) for name, a in (logical_axes or {}).items()}
    model = FunctionModel(
        params, apply, head, embedding, init_cache, FrozenDict(axes)
    )
    for name in ("head", "embedding"):
        rows = jax.eval_shape(lambda m, n=name: getattr(m, n), model)
        shape = getattr(rows, "shape", ())
        if len(shape) != 2:
            raise ValueError(
                f"{name}(params) has shape {shape} and must be [V, D], a row "
                "for every id; transpose a [D, V] kernel"
            )
    _check_axes(model)
    _check_reading(model, keeps=init_cache is not None)
    return model


def _check_axes(model: FunctionModel) -> None:
    """Refuse names that no parameter has: it would not be spread."""
    axes = model.logical_axes
    leaves = jax.tree_util.tree_leaves_with_path(model)
    unused = set(axes) - {parameter_name(*leaf, axes) for leaf in leaves}
    if unused:
        name = min(unused)
        raise ValueError(
            f"logical_axes has {name!r} with {len(axes[name])} axes, which is "
            "no parameter of as many dimensions; name an attribute, or the "
            "end of a path with its '/', such as 'params/embedding'"
        )


def _check_reading(model: FunctionModel, keeps: bool) -> None:
    """Check what reading two tokens returns, by shape alone."""
    width = jax.eval_shape(lambda m: m.head, model).shape[1]
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 2, 3 if keeps else 2), bool)
    cache = jax.eval_shape(lambda: model.init_cache(1, 3)) if keeps else None
    try:
        returned = jax.eval_shape(
            lambda m, *args: m.apply(m.params, *args),
            model, ids, ids, mask, cache,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise ValueError(
            "apply(params, tokens, positions, mask, cache) cannot read tokens "
            f"i32[1, 2], positions i32[1, 2] and mask bool{list(mask.shape)}; "
            f"it must take a batch of rows ({error})"
        ) from error
    hidden = returned[0] if isinstance(returned, tuple) else returned
    dtype = getattr(hidden, "dtype", jnp.float32)
    due = (jax.ShapeDtypeStruct((1, 2, width), dtype), cache)
    if not keeps and isinstance(returned, tuple) and len(returned) == 2:
        returned = (hidden, None)  # what it makes of no cache is not kept
    if _form(returned) != _form(due):
        raise ValueError(
            f"apply returned {returned} and must return (hidden, cache) = "
            f"{due}: for two tokens the states before the output head, not "
            "logits, as wide as the head; and the cache that it was given, "
            "with the tokens written in place, or None"
        )


def _form(tree: Any) -> tuple[Any, list]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.shape, x.dtype) for x in leaves]


def _append(
    cache: TokenCache, tokens: jax.Array, positions: jax.Array, mask: jax.Array
) -> TokenCache:
    start = (0, cache.length)
    return cache.replace(
        tokens=update_slice(cache.tokens, tokens, start),
        positions=update_slice(cache.positions, positions, start),
        mask=update_slice(cache.mask, mask, (*start, 0)),
    )


def _with_itself(mask: jax.Array) -> jax.Array:
    """Let every token attend to itself.

    Real ones do already, and padding that attends to nothing would be nan in
    a softmax over -inf."""
    return mask | jnp.eye(mask.shape[-1], dtype=bool)
