"""What the phases ask of a model, and any pure function made to answer it.

Rollouts, branches, annotation, update and statistics call a model and read a
few of its attributes: :class:`LanguageModel` is the whole list. The decoder of
this project has them. :func:`from_function` gives them to any function
``(params, tokens, positions, mask, cache) -> (hidden, cache)``: a Flax module,
another library's model, a few lines of ``jax.numpy``. Ours.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from topd_jax.parallel.sharding import constrain
from topd_jax.types import Head, head_rows

Apply = Callable[..., tuple[jax.Array, Any]]
Select = Callable[[Any], Head]


class LanguageModel(Protocol):
    """What is asked of a student or a teacher, which is also a pytree.

    Leaves are arrays; a student's are floating, since it is differentiated
    as it is. Of the teacher's leaves nothing is asked.

    Attributes:
      head: [V, D] output head, an array or a
        :class:`~topd_jax.types.CappedHead`; V may differ between student and
        teacher (the shared ids count), and so may D.
      embedding: [V, E] the space of the transport cost; asked of the student
        of an objective that looks ahead.
      logical_axes: parameter name -> logical axes, for a mesh; parameters
        without a name in it are replicated. See
        :func:`~topd_jax.parallel.sharding.tree_shardings`.
    """

    head: Any
    embedding: Any
    logical_axes: Mapping[str, Sequence[str | None]]

    def init_cache(self, batch: int, columns: int) -> Any:
        """An empty cache: any pytree whose structure calls do not change.

        Rows and columns are told from how the shapes follow the arguments;
        columns that are added are zeros behind the others.

        Args:
          batch: B rows.
          columns: L, how many can be written.
        """

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: Any = None,
    ) -> tuple[jax.Array, Any]:
        """Reads tokens.

        What a token sees is the mask's to say, and nothing else's: columns of
        a cache need not be in the order of their positions, and branches of
        one prefix stand side by side. A token sees itself unless it is
        padding; a row of padding may see nothing and must stay finite.

        Args:
          tokens: i32[B, S].
          positions: i32[B, S], 0 at the first existing token of a row.
          mask: bool[B, S, L] columns each token sees; L == S without a
            cache, else all columns of the cache.
          cache: the S tokens are written at its next S columns; None reads
            the tokens alone.

        Returns:
          (hidden [B, S, D], of which ``head`` makes the logits of the next
          token; the cache with S more columns written, or None).
        """


@struct.dataclass
class Columns:
    """A cache of what was read, for a function that keeps none of its own.

    Attributes:
      tokens: i32[B, L].
      positions: i32[B, L].
      mask: bool[B, L, L] what each column sees, written or not.
      length: i32[] columns written so far.
    """

    tokens: jax.Array
    positions: jax.Array
    mask: jax.Array
    length: jax.Array


@struct.dataclass
class FunctionModel:
    """A pure function and its parameters, as a :class:`LanguageModel`.

    Made by :func:`from_function`. The parameters are the only leaves; the
    functions are static, compared by identity: make a model once, and not
    anew from new lambdas, or whatever is jitted compiles again.

    Attributes:
      params: any pytree.
      apply: the function.
      select_head: params -> [V, D].
      select_embedding: params -> [V, E], or None for the head's rows.
      make_cache: (batch, columns) -> cache, or None to read again.
      axes: pairs of a parameter's name and its logical axes.
    """

    params: Any
    apply: Apply = struct.field(pytree_node=False)
    select_head: Select = struct.field(pytree_node=False)
    select_embedding: Select | None = struct.field(pytree_node=False)
    make_cache: Callable[[int, int], Any] | None = struct.field(
        pytree_node=False
    )
    axes: tuple = struct.field(pytree_node=False)

    @property
    def head(self) -> Head:
        """[V, D] output head."""
        return self.select_head(self.params)

    @property
    def embedding(self) -> jax.Array:
        """[V, E] rows between which the transport cost is taken."""
        if self.select_embedding is None:
            return head_rows(self.head)
        return self.select_embedding(self.params)

    @property
    def logical_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Parameter name -> logical axes."""
        return dict(self.axes)

    def init_cache(self, batch: int, columns: int) -> Any:
        """An empty cache; see :class:`LanguageModel`."""
        if self.make_cache is not None:
            return self.make_cache(batch, columns)
        ids = jnp.zeros((batch, columns), jnp.int32)
        ids = constrain(ids, "batch", None)
        sight = jnp.zeros((batch, columns, columns), bool)
        sight = constrain(sight, "batch", None, None)
        return Columns(ids, ids, sight, jnp.zeros((), jnp.int32))

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: Any = None,
    ) -> tuple[jax.Array, Any]:
        """Reads tokens; see :class:`LanguageModel`."""
        if cache is None:
            mask = _with_itself(mask)
            return self.apply(self.params, tokens, positions, mask, None)
        if self.make_cache is not None:
            return self.apply(self.params, tokens, positions, mask, cache)
        cache = _written(cache, tokens, positions, mask)
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
    """Makes a student or a teacher of any pure function.

    Without ``init_cache`` the function needs no cache of its own: whatever it
    has read is kept as ids, and all columns are read again at every token,
    each seeing what its mask said. That is exact, and costs a whole reading a
    token: for models that are small, or that only read.

    Args:
      apply: (params, tokens i32[B, S], positions i32[B, S], mask bool[B, S,
        L], cache) -> (hidden [B, S, D], cache), as
        :meth:`LanguageModel.__call__`; without ``init_cache`` it is always
        called with cache None, L == S, and every token seeing itself.
      params: any pytree of arrays.
      head: params -> [V, D] output head.
      embedding: params -> [V, E] for the transport cost; None takes the
        head's rows.
      init_cache: (batch, columns) -> the empty cache that ``apply`` writes.
      logical_axes: parameter -> logical axes on a mesh, by attribute name or
        by the end of its path, joined by "/" ("Embed_0/embedding").
        Parameters that are not named are replicated.

    Returns:
      The model.

    Raises:
      ValueError: where head, embedding or what ``apply`` returns has another
        shape, or the cache comes back changed in structure, shape or dtype.
    """
    axes = {name: tuple(a) for name, a in (logical_axes or {}).items()}
    model = FunctionModel(
        params, apply, head, embedding, init_cache, tuple(axes.items())
    )
    for name in ("head", "embedding"):
        rows = jax.eval_shape(lambda m, n=name: getattr(m, n), model)
        if len(jnp.shape(rows)) != 2:
            raise ValueError(
                f"{name}(params) has shape {jnp.shape(rows)} and must be "
                "[V, D], a row for every id; transpose a [D, V] kernel"
            )
    _check_reading(model, keeps=init_cache is not None)
    return model


def _check_reading(model: FunctionModel, keeps: bool) -> None:
    """Reads two tokens, as shapes alone."""
    width = jax.eval_shape(lambda m: m.head, model).shape[1]
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 2, 3 if keeps else 2), bool)
    cache = jax.eval_shape(lambda: model.init_cache(1, 3)) if keeps else None
    found = jax.eval_shape(
        lambda m, *args: m.apply(m.params, *args), model, ids, ids, mask, cache
    )
    if not isinstance(found, tuple) or len(found) != 2:
        raise ValueError(
            f"apply returned {found} and must return (hidden, cache); a "
            "function without a cache returns (hidden, None)"
        )
    hidden, after = found
    if getattr(hidden, "shape", None) != (1, 2, width):
        raise ValueError(
            f"apply returned hidden {hidden} for tokens [1, 2] and must "
            f"return [1, 2, {width}], as wide as the head: the states before "
            "the output head, not logits"
        )
    if keeps and jax.tree.structure(after) != jax.tree.structure(cache):
        raise ValueError(
            f"apply returned the cache {jax.tree.structure(after)} for "
            f"{jax.tree.structure(cache)}; it must return what it was given, "
            "with more columns written"
        )
    changed = [
        f"{b.shape} {b.dtype} for {a.shape} {a.dtype}"
        for a, b in zip(
            *map(jax.tree.leaves, (cache, after if keeps else None)),
            strict=True,
        )
        if (a.shape, a.dtype) != (b.shape, b.dtype)
    ]
    if changed:
        raise ValueError(
            f"apply changed arrays of the cache: {'; '.join(changed)}; columns "
            "are written in place"
        )


def _written(
    cache: Columns, tokens: jax.Array, positions: jax.Array, mask: jax.Array
) -> Columns:
    put = jax.lax.dynamic_update_slice
    at = (0, cache.length)
    return cache.replace(
        tokens=put(cache.tokens, tokens, at),
        positions=put(cache.positions, positions, at),
        mask=put(cache.mask, mask, (*at, 0)),
    )


def _with_itself(mask: jax.Array) -> jax.Array:
    """Every token sees itself: real ones do already, and padding that sees
    nothing would be nan in a softmax over -inf."""
    return mask | jnp.eye(mask.shape[-1], dtype=bool)
