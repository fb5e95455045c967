"""EngineProcess: the engine's process and the socket to it, from the server's side."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys

from engine.config import EngineConfig
from engine.errors import ConfigurationError, EngineDeadError
from engine.types import EngineInfo
from engine.wire import (
    PROTOCOL_VERSION,
    Failed,
    FailureKind,
    FromEngine,
    Hello,
    Ready,
    Start,
    ToEngine,
    WireError,
    check_hello,
    encode,
    receive_from_engine,
)

EXIT_SECONDS = 1.0
"""How long a process that has closed its socket may take to exit, and the other way round."""

_STDERR = 2
# How long OpenMP's threads wait by spinning, in turns of the loop. For long, as libgomp does by itself, they hold up
# the very thread they wait for as soon as anything else, like this process, needs a core: a step then takes ten times
# as long. Not at all, every wait costs a wake-up. (docs/performance.md has the figures.)
_SPINCOUNT = "3000"


class EngineProcess:
    """The child process and the socket to it."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def spawn(cls, core: str) -> EngineProcess:
        """A fresh interpreter: nothing of this process but one end of a socket goes into it."""
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            try:
                process = await asyncio.create_subprocess_exec(
                    # -P: an `engine` folder where the operator happens to stand is not our package.
                    *(sys.executable, "-P", "-m", "engine.process", "--fd", str(theirs.fileno()), "--core", core),
                    pass_fds=[theirs.fileno()],
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=_STDERR,
                    env=child_environment(),
                )
            except BaseException:
                writer.transport.abort()
                raise
        return cls(process, reader, writer)

    async def load(self, config: EngineConfig, *, progress: bool) -> EngineInfo:
        """Greet and wait until the model is loaded. Raises ConfigurationError and EngineDeadError."""
        self.send(Hello(PROTOCOL_VERSION))
        self.send(Start(config, progress))
        try:
            if (message := await self.receive()) is not None:
                check_hello(message)
            while message is not None:
                message = await self.receive()
                match message:
                    case Ready(info):
                        return info
                    case Failed(FailureKind.CONFIGURATION, text):
                        raise ConfigurationError(text)
                    case Failed(_, text):
                        raise EngineDeadError(f"the engine failed while starting: {text}")
        except WireError as error:
            raise EngineDeadError(str(error)) from None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), EXIT_SECONDS)
        await self.kill()
        raise EngineDeadError(f"{self.describe_exit()} while starting")

    def send(self, message: ToEngine) -> None:
        """Without waiting: what the engine has not read yet is bounded by the number of requests in flight."""
        frame = encode(message)
        if not self._writer.is_closing():
            self._writer.write(frame)

    async def receive(self) -> FromEngine | None:
        return await receive_from_engine(self._reader)

    async def wait(self) -> int:
        return await self._process.wait()

    def signal_kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def close(self) -> None:
        """Close the socket, which makes the process leave."""
        self._writer.close()

    async def kill(self) -> None:
        """Make sure that the process is gone and reaped, and the socket closed."""
        self.signal_kill()
        self._writer.transport.abort()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        await self._process.wait()

    def describe_exit(self) -> str:
        code = self._process.returncode
        if code is not None and code < 0:
            return f"the engine process was killed by {signal.Signals(-code).name}"
        return f"the engine process ended with exit code {code}"


def child_environment() -> dict[str, str]:
    """Ours, the modules where this process finds them, and a spin count unless the operator has set how to wait."""
    result = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & result.keys():
        result["GOMP_SPINCOUNT"] = _SPINCOUNT
    return result
