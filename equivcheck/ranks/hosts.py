"""Take part in a process group that a launcher started: every process of it keeps one rank, the first one asks.

`torchrun` starts the same command once per rank, on one machine or on several. Each of these processes is a host: it
starts the process of its own rank, hands on what is said to it and what it says, and ends it. So the loop of the user
may fail, hang or be killed, case after case, and whoever was launched is there to tell of it.

The hosts meet in the store of the launcher's group, where the first one leaves an address and a secret; from then on
each has a connection to the first. The ranks themselves meet in the same store.
"""

from __future__ import annotations

import array
import os
import secrets
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing import connection as connections
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from torch._C._distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from equivcheck.errors import EquivcheckError, StepError
from equivcheck.ranks import group, wire
from equivcheck.ranks.launched import Launch, alone
from equivcheck.ranks.links import Local
from equivcheck.ranks.status import IDLE, Board, Standing
from equivcheck.ranks.worker import Setup

if TYPE_CHECKING:
    from typing_extensions import Self

# How long the processes of a group wait for each other to come up; torch's own limit for its store.
MEETING: Final = 300.0
# After this many seconds without an answer a machine counts as gone.
SILENT: Final = 60
# A launcher that has seen one process fail ends the others: the first one first says which one failed, and why.
LAST_WORDS: Final = 5.0
# A host looks so often how far its rank got.
LOOK: Final = 0.2
_CHUNK: Final = 1 << 24
_FRAME: Final = struct.Struct("<cI")
_NAMED: Final = struct.Struct("32s")
_STANDS: Final = struct.Struct("<7q")
_START, _MESSAGE, _SHARE, _CLOSE, _END = b"S", b"M", b"A", b"C", b"E"
_SAID, _STANDING, _DIED = b"m", b"s", b"d"
_INTERRUPTED: Final = 130
_INTERNAL: Final = 70


# ---- the first host ----------------------------------------------------------------------------


class Hosts:
    """The processes of a launched group, as the first of them sees them; a context manager.

    On leaving it the others are told the exit code, and end with the same.

    Args:
        launch: What the launcher told; of rank 0.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.code = 0
        self._peers: dict[int, _Peer] = {}
        self._generation = 0
        self._interface: str | None = None
        self._stack = ExitStack()
        self._timer: threading.Timer | None = None
        self._store: Store | None = None

    def __enter__(self) -> Self:
        global _hosts  # noqa: PLW0603 - a process belongs to one group
        signal.signal(signal.SIGTERM, self._tell_first)
        try:
            self._meet()
        except BaseException as error:
            self._finish(_code_of(error))
            raise
        _hosts = self
        self._stack.enter_context(alone(self.launch))
        return self

    def __exit__(
        self,
        _: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        global _hosts  # noqa: PLW0603 - as above
        _hosts = None
        self._stack.close()
        self._finish(self.code if error is None else _code_of(error))

    def _finish(self, code: int) -> None:
        # From here on all end by themselves; a launcher that sees the first one gone need not hurry the others.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self._timer is not None:
            self._timer.cancel()
        for peer in self._peers.values():
            peer.send(_END, 0, str(code).encode())
        for peer in self._peers.values():
            peer.connection.close()

    def _tell_first(self, _signal: int, _frame: Any) -> None:
        """Let the case under way tell what has failed, before this run is interrupted."""
        if self._timer is None:
            self._timer = threading.Timer(LAST_WORDS, os.kill, (os.getpid(), signal.SIGINT))
            self._timer.daemon = True
            self._timer.start()

    def _meet(self) -> None:
        launch = self.launch
        print(
            f"equivcheck: rank 0 of {launch.world_size}, started by a launcher; meeting the others at "
            f"{launch.address}:{launch.port}",
            file=sys.stderr,
            flush=True,
        )
        self._store = _store_of(launch)
        listener = _listener()
        secret = secrets.token_bytes(32)
        port = int(listener.getsockname()[1])
        self._store.set(_key(launch), f"{port} {secret.hex()}")
        listener.settimeout(1.0)
        until = time.monotonic() + MEETING
        with listener:
            while len(self._peers) < launch.world_size - 1:
                if time.monotonic() > until:
                    raise self._absent()
                try:
                    each, _ = listener.accept()
                except (TimeoutError, InterruptedError):
                    continue
                self._admit(each, secret)

    def _admit(self, each: socket.socket, secret: bytes) -> None:
        """Take a connection of another host, if it knows the secret."""
        _keep_alive(each)
        each.settimeout(None)
        interface = _interface_of(each)
        connection = Connection(each.detach())
        try:
            _prove(connection, secret, first=True)
            rank = int.from_bytes(connection.recv_bytes(8), "little")
        except (OSError, EOFError, ValueError, AuthenticationError):
            connection.close()
            return
        self._interface = self._interface or interface
        self._peers[rank] = _Peer(rank, connection)

    def _absent(self) -> EquivcheckError:
        missing = [r for r in range(1, self.launch.world_size) if r not in self._peers]
        return StepError(
            f"rank-absent: {_listed(missing)} of {self.launch.world_size} did not come within {MEETING:.0f} s",
            where=f"the store at {self.launch.address}:{self.launch.port}",
            expected="the same command started once for every rank",
            because="RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say that this process belongs to a group",
            fix="unset RANK and WORLD_SIZE, to run without a launcher",
        )

    def links(self, folder: Path, board: Board, device: str) -> list[Local | _Remote]:
        """Start a process for every rank and return the ways to them.

        Args:
            folder: Where board and arena of this machine's own rank lie.
            board: Written by that rank.
            device: "cpu" or "cuda".
        """
        for peer in self._peers.values():
            peer.hear()
            if peer.lost:
                raise StepError(
                    f"rank-died: rank {peer.rank} has gone in an earlier case",
                    where=f"rank {peer.rank}, before build()",
                    expected="every process that the launcher started, to the end of the run",
                    because="a launcher's process cannot be started again from here",
                )
        self._generation += 1
        launch = self.launch
        prefix = f"equivcheck/{launch.attempt}/{self._generation}"
        order = wire.dumps({"device": device, "prefix": prefix})
        found: list[Local | _Remote] = []
        for rank in range(1, launch.world_size):
            peer = self._peers[rank]
            peer.begin(self._generation)
            peer.send(_START, self._generation, order)
            found.append(_Remote(peer, self._generation))
        setup = _setup(launch, folder, device, prefix, self._interface)
        return [Local(setup, board), *found]


_hosts: Hosts | None = None


def hosts() -> Hosts | None:
    """Return the hosts of the group that this process was launched in; None if it is on its own."""
    return _hosts


class _Peer:
    """Another host, over all cases."""

    def __init__(self, rank: int, connection: Connection) -> None:
        self.rank = rank
        self.connection = connection
        self.lost = False
        self.generation = 0
        self.arrived: deque[tuple[bytes, bytes]] = deque()

    def begin(self, generation: int) -> None:
        """Forget what earlier ranks said."""
        self.generation = generation
        self.arrived.clear()

    def send(self, kind: bytes, generation: int, content: bytes = b"") -> None:
        """Send a frame; a host that has gone is noticed when it is heard."""
        with suppress(OSError):
            self.connection.send_bytes(_FRAME.pack(kind, generation) + content)

    def hear(self) -> None:
        """Take what has arrived for the ranks of now."""
        try:
            while not self.lost and self.connection.poll():
                frame = self.connection.recv_bytes()
                kind, generation = _FRAME.unpack_from(frame)
                if generation == self.generation:
                    self.arrived.append((kind, frame[_FRAME.size :]))
        except (EOFError, OSError):
            self.lost = True


class _Remote:
    """A rank that another host keeps."""

    def __init__(self, peer: _Peer, generation: int) -> None:
        self.exit_code: int | None = None
        self.lost = False
        self._peer, self._generation = peer, generation
        self._standing = Standing(0, -1, 0, 0, 0, IDLE)
        self._time = 0
        self._shared: tuple[str, int] = ("", 0)

    def send(self, message: bytes) -> None:
        """Send a message; a rank that has gone already does not hear it."""
        self._peer.send(_MESSAGE, self._generation, message)

    def share(self, path: Path) -> None:
        """Send what the arena's file has got since the last time: the host has a file of its own."""
        begin = self._shared[1] if self._shared[0] == path.name else 0
        with path.open("rb") as file:
            file.seek(begin)
            while True:
                chunk = file.read(_CHUNK)
                begin += len(chunk)
                if chunk or self._shared[0] != path.name:  # an empty file is there as well
                    self._peer.send(
                        _SHARE, self._generation, _NAMED.pack(path.name.encode()) + chunk
                    )
                    self._shared = (path.name, begin)
                if not chunk:
                    break

    def objects(self) -> list[Any]:
        """Return the connection to its host."""
        return [self._peer.connection]

    def messages(self) -> Iterator[bytes]:
        """Yield what the rank has said; note where it stands, and its end."""
        if self._peer.generation != self._generation:  # Its host keeps another by now.
            self.exit_code = -1
            return
        self._peer.hear()
        while self._peer.arrived:
            kind, content = self._peer.arrived.popleft()
            if kind == _SAID:
                yield content
            elif kind == _STANDING:
                *numbers, self._time = _STANDS.unpack(content)
                self._standing = Standing(*numbers)
            elif kind == _DIED:
                self.exit_code = int(content)
        if self._peer.lost and self.exit_code is None:
            self.exit_code, self.lost = -1, True

    def standing(self) -> Standing:
        """Return where the rank stood last."""
        return self._standing

    def processor_time(self) -> int:
        """Return the processor time that it had used then, in ticks."""
        return self._time

    def end(self) -> None:
        """Have its host kill it."""
        self._peer.send(_CLOSE, self._generation)

    def close(self) -> None:
        """Do nothing: its host waits for its end before it starts another."""


# ---- the other hosts ---------------------------------------------------------------------------


def serve(launch: Launch) -> int:
    """Keep one rank for the first host, and return the exit code that it tells.

    Args:
        launch: What the launcher told; not of rank 0.
    """
    # The first host decides: it goes on to the end of the case, and takes everybody with it.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    connection, interface, store = _enter(launch)
    del store
    with alone(launch):
        return _Host(launch, connection, interface).serve()


def _enter(launch: Launch) -> tuple[Connection, str | None, Store]:
    """Return the connection to the first host.

    Raises:
        StepError: It is not there.
    """
    try:
        store = _store_of(launch)
        port, secret = store.get(_key(launch)).decode().split()
        peer = socket.create_connection((launch.address, int(port)), timeout=MEETING)
        _keep_alive(peer)
        peer.settimeout(None)
        interface = _interface_of(peer)
        connection = Connection(peer.detach())
        _prove(connection, bytes.fromhex(secret), first=False)
        connection.send_bytes(launch.rank.to_bytes(8, "little"))
    except (RuntimeError, OSError, EOFError) as error:
        raise StepError(
            f"rank-absent: rank 0 of {launch.world_size} cannot be reached from rank {launch.rank}",
            where=f"{launch.address}:{launch.port}",
            expected="the same command started once for every rank, on machines that reach each other",
            because=str(error).splitlines()[0],
            fix="unset RANK and WORLD_SIZE, to run without a launcher",
        ) from None
    return connection, interface, store


class _Host:
    """Keeps the process of one rank, case after case."""

    def __init__(self, launch: Launch, connection: Connection, interface: str | None) -> None:
        self._launch = launch
        self._connection = connection
        self._interface = interface
        self._generation = 0
        self._link: Local | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._shown: tuple[Standing, int] | None = None
        self._arena = "none"

    def serve(self) -> int:
        """Do what the first host says until it says the end, or is gone."""
        code: int | None = None
        try:
            while code is None:
                link = self._link
                objects = [self._connection, *(link.objects() if link is not None else ())]
                heard = connections.wait(objects, LOOK)
                if self._connection in heard:
                    code = self._obey(self._connection.recv_bytes())
                if link is not None and link is self._link:
                    self._tell(link)
        except (EOFError, OSError):
            print(f"error: rank-died: rank {self._launch.rank}: rank 0 has gone", file=sys.stderr)
            return StepError.exit_code
        finally:
            self._close()
        return code

    def _obey(self, frame: bytes) -> int | None:
        kind, generation = _FRAME.unpack_from(frame)
        content = frame[_FRAME.size :]
        if kind == _END:
            return int(content)
        if kind == _START:
            self._start(generation, **wire.loads(content))
        elif generation != self._generation:
            pass
        elif kind == _CLOSE:
            self._close()
        elif kind == _SHARE and self._folder is not None:
            self._write(Path(self._folder.name), content)
        elif kind == _MESSAGE and self._link is not None:
            self._link.send(content)
        return None

    def _write(self, folder: Path, content: bytes) -> None:
        """Add to the file of the arena; another one takes the place of the one before."""
        name = _NAMED.unpack_from(content)[0].rstrip(b"\0").decode()
        if name != self._arena:
            (folder / self._arena).unlink(missing_ok=True)
            self._arena = name
        with (folder / name).open("ab") as file:
            file.write(content[_NAMED.size :])

    def _start(self, generation: int, device: str, prefix: str) -> None:
        self._close()
        self._generation = generation
        self._folder = tempfile.TemporaryDirectory(prefix="equivcheck-ranks-")
        folder = Path(self._folder.name)
        setup = _setup(self._launch, folder, device, prefix, self._interface)
        self._link = Local(setup, Board(folder / "board", 1))

    def _tell(self, link: Local) -> None:
        """Hand on what the rank says, with where it stands when it says so."""
        for message in link.messages():
            self._show(link)
            self._send(_SAID, message)
        self._show(link)
        if link.exit_code is not None:
            self._send(_DIED, str(link.exit_code).encode())
            self._close()

    def _show(self, link: Local) -> None:
        now = link.standing(), link.processor_time()
        if now == self._shown:
            return
        self._shown = now
        at = now[0]
        numbers = (at.optimizer_step, at.micro_step, at.backwards, at.events, at.run, at.state)
        self._send(_STANDING, _STANDS.pack(*numbers, now[1]))

    def _send(self, kind: bytes, content: bytes) -> None:
        self._connection.send_bytes(_FRAME.pack(kind, self._generation) + content)

    def _close(self) -> None:
        if self._link is not None:
            self._link.end()
            self._link.close()
            self._link = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        self._shown = None


# ---- how they meet -----------------------------------------------------------------------------


def _setup(launch: Launch, folder: Path, device: str, prefix: str, interface: str | None) -> Setup:
    variables = {**launch.environment, "TORCH_FR_BUFFER_SIZE": str(group.FLIGHT_ENTRIES)}
    if interface is not None and "GLOO_SOCKET_IFNAME" not in os.environ:
        # By itself gloo takes the address that this machine's name has, which others may not reach.
        variables["GLOO_SOCKET_IFNAME"] = interface
    return Setup(
        folder=str(folder),
        rank=launch.rank,
        world_size=launch.world_size,
        environment=variables,
        search_path=list(sys.path),
        cwd=str(Path.cwd()),
        device=device,
        slot=0,
        store=(launch.address, launch.port, prefix),
    )


def _store_of(launch: Launch) -> Store:
    """Return the store of the launcher's group; without a launcher's own the first host serves it."""
    limit = timedelta(seconds=MEETING)
    store, _, _ = next(iter(rendezvous("env://", launch.rank, launch.world_size, timeout=limit)))
    return store  # type: ignore[no-any-return]


def _key(launch: Launch) -> str:
    return f"equivcheck/{launch.attempt}/address"


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # A kernel may know IPv6 and have no address of it.
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _prove(connection: Connection, secret: bytes, *, first: bool) -> None:
    """Show each other that both know the secret, without sending it."""
    steps = [connections.deliver_challenge, connections.answer_challenge]
    for step in steps if first else reversed(steps):
        step(connection, secret)


def _keep_alive(each: socket.socket) -> None:
    """Send small frames at once, and notice a machine that has gone without a word."""
    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    each.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    wanted = {
        "TCP_KEEPIDLE": SILENT // 4,
        "TCP_KEEPINTVL": SILENT // 4,
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": 1000 * SILENT,
    }
    for name, value in wanted.items():
        if hasattr(socket, name):
            each.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _interface_of(each: socket.socket) -> str | None:
    """Return the network interface through which a connection goes; None where that cannot be told."""
    if sys.platform != "linux":
        return None
    import fcntl  # noqa: PLC0415 - not on every system

    address = each.getsockname()[0].removeprefix("::ffff:")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = array.array("B", name.encode()[:15].ljust(256, b"\0"))
            with suppress(OSError):  # An interface without an IPv4 address.
                fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR, linux/sockios.h
                # struct ifreq: 16 bytes of name, then a sockaddr_in whose address is at 4.
                if socket.inet_ntoa(request[20:24].tobytes()) == address:
                    return name
    return None


def _listed(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _code_of(error: BaseException) -> int:
    if isinstance(error, EquivcheckError):
        return error.exit_code
    return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else _INTERNAL
