"""Sends arrays between halves of a TPU slice; run by test_tpu_compile."""

import sys

import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from topd_jax.parallel import sharding, transfers
from topd_jax.parallel.teacher_mesh import TeacherMeshSettings, make_meshes
from topd_jax.planning.programs import topology_devices
from topd_jax.training.config import MeshSettings


def main() -> None:
    devices = topology_devices(sys.argv[1])
    half = TeacherMeshSettings(devices=len(devices) // 2, tensor=4)
    ours, theirs = make_meshes(MeshSettings(fsdp=4), half, devices=devices)
    assert transfers.needed(ours, theirs)
    rows = NamedSharding(ours, PartitionSpec(("data", "fsdp")))
    embedding = NamedSharding(ours, PartitionSpec("tensor", "fsdp"))
    kinds = [
        ((64, 128, 256), jnp.bfloat16, rows, NamedSharding(
            theirs, PartitionSpec(("data", "fsdp")))),
        ((1024, 256), jnp.float32, embedding, NamedSharding(
            theirs, PartitionSpec("tensor", "fsdp"))),
        ((64, 128), jnp.bool_, rows, sharding.replicated(theirs)),
        ((64, 2), jnp.int4, rows, sharding.replicated(theirs)),
        ((2,), jnp.uint32, sharding.replicated(ours),
         sharding.replicated(theirs)),
    ]  # fmt: skip
    sender = transfers.sender(*zip(*kinds, strict=True))
    made = sender.program.lower(*sender.operands).compile()
    held = sum(
        x.size * x.dtype.itemsize / len(devices) for x in sender.operands
    )
    memory = made.memory_analysis()
    # Pieces on their way, and no array whole.
    assert memory.temp_size_in_bytes < 2 * held, memory
    sends = made.as_text().count("collective-permute-start(")
    assert sends >= 4 + 4 + 8 + 8 + 1, sends  # rounds of each
    print("sent between halves")


if __name__ == "__main__":
    main()
