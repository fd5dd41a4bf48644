"""Write numbers for TensorBoard."""

import pathlib
import time
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Board:
    """A directory that TensorBoard reads.

    Not a SummaryWriter, whose thread dies of a full disk and leaves whoever
    writes the next number waiting for it.
    """

    def __init__(self, directory: pathlib.Path, step: int) -> None:
        """Begin a file.

        Args:
          directory: made where it is missing.
          step: what earlier files have from it on is void.
        """
        directory.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(directory / "events"))
        self._write(step, session_log=SessionLog(status=SessionLog.START))

    def add(self, name: str, value: float, step: int) -> None:
        """Write a number."""
        self._write(step, summary=scalar(name, value))

    def flush(self) -> None:
        """Hand what was written to the system."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, step: int, **event: Any) -> None:
        self._writer.write_event(
            Event(wall_time=time.time(), step=step, **event)
        )
