"""Settings of the device mesh."""

import dataclasses

from topd_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Devices on each axis; chosen for the run if all are left as here."""

    data: int = setting(-1, "rows; -1: all that the others leave", least=-1)
    fsdp: int = setting(1, "rows and parameters", least=1)
    tensor: int = setting(1, "heads, feed-forward columns, vocabulary", least=1)
    expert: int = setting(1, "rows, and the experts of a mixture", least=1)
    sequence: int = setting(
        1, "columns of the rows that are learned from (2407.21783)", least=1
    )
