"""A file system whose server can be told to answer nothing, as that of a dead network mount: FUSE, spoken directly."""

import ctypes
import errno
import os
import stat
import struct
import threading

LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE, FLUSH, INIT = 1, 2, 3, 14, 15, 18, 25, 26
OPENDIR, READDIR, RELEASEDIR = 27, 28, 29
SILENT = (FORGET, 36, 42)  # these, INTERRUPT and BATCH_FORGET get no reply
HEADER, REPLY = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
MNT_DETACH = 2


class HangingMount:
    """Read only, with one file, `name`, that holds `content`. Needs root; raises OSError where FUSE is not to be had.

    While `answers` is not set, no request is answered. `hang_at_read`: the number of the read that clears it, from 1.
    """

    def __init__(self, folder, name: str, content: bytes):
        self.name, self.content, self.folder = name.encode(), content, str(folder).encode()
        self.answers, self.reads, self.hang_at_read = threading.Event(), 0, None
        self.answers.set()
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self.device},rootmode=40000,user_id=0,group_id=0".encode()
        if self.libc.mount(b"hanging", self.folder, b"fuse", 0, options):
            os.close(self.device)
            raise OSError(ctypes.get_errno(), "a FUSE file system can't be mounted here")
        self.server = threading.Thread(target=self._serve, daemon=True)
        self.server.start()

    def close(self) -> None:
        """Whoever waits gets an error."""
        self.libc.umount2(self.folder, MNT_DETACH)
        os.close(self.device)
        self.answers.set()

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self.device, 2**20 + 4096)
            except OSError:  # unmounted
                return
            _, code, unique, node, *_ = HEADER.unpack_from(request)
            self.reads += code == READ
            if code == READ and self.reads == self.hang_at_read:
                self.answers.clear()
            self.answers.wait()
            if code in SILENT:
                continue
            error, body = self._answer(code, node, request[HEADER.size :])
            try:
                os.write(self.device, REPLY.pack(REPLY.size + len(body), -error, unique) + body)
            except OSError:  # unmounted, or who asked was killed
                continue

    def _answer(self, code: int, node: int, body: bytes) -> tuple[int, bytes]:
        if code == INIT:
            return 0, struct.pack("<IIIIHHIIHH32x", 7, 31, 2**17, 0, 8, 8, 4096, 1, 32, 0)
        if code == LOOKUP:
            if body.rstrip(b"\0") != self.name:
                return errno.ENOENT, b""
            return 0, struct.pack("<QQQQII", 2, 0, 0, 0, 0, 0) + self._attributes(2)
        if code == GETATTR:
            return 0, struct.pack("<QII", 0, 0, 0) + self._attributes(node)
        if code in (OPEN, OPENDIR):
            return 0, bytes(16)
        if code == READ:
            _, start, size = struct.unpack_from("<QQI", body)
            return 0, self.content[start : start + size]
        if code == READDIR:
            _, start = struct.unpack_from("<QQ", body)
            entry = struct.pack("<QQII", 2, 1, len(self.name), stat.S_IFREG >> 12) + self.name
            return 0, b"" if start else entry.ljust(-(-len(entry) // 8) * 8, b"\0")
        if code in (RELEASE, RELEASEDIR, FLUSH):
            return 0, b""
        return errno.ENOSYS, b""

    def _attributes(self, node: int) -> bytes:
        size, mode = (0, stat.S_IFDIR | 0o755) if node == 1 else (len(self.content), stat.S_IFREG | 0o644)
        return struct.pack("<6Q10I", node, size, -(-size // 512), 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
