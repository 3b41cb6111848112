"""Tries out whether another process can map memory of this one by CUDA IPC, which some containers and drivers refuse.
Run as a program, this file is that process."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path


class Handle(ctypes.Structure):
    """CUDA's name of memory. Before it torch writes a version, and a letter for the kind of memory: c for plain one."""

    _fields_ = (("bytes", ctypes.c_ubyte * 64),)


def refusal(device: int, handle: bytes) -> str:
    """Why another process cannot open `handle`, torch's for memory of GPU number `device`; empty if it can, or if that
    cannot be tried out. Takes a few tenths of a second."""
    runtime = re.search(r"/\S*/libcudart\.so\S*", Path("/proc/self/maps").read_text())
    if runtime is None or handle[-65:-64] != b"c":
        return ""
    command = [sys.executable, "-I", "-S", __file__, runtime[0], str(device), handle[-64:].hex()]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except subprocess.TimeoutExpired as error:
        return f"another process had not opened it after {error.timeout:.0f} s"


if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
    cuda, given = ctypes.CDLL(None), Handle.from_buffer_copy(bytes.fromhex(sys.argv[3]))
    cuda.cudaGetErrorString.restype = ctypes.c_char_p
    if not cuda.cudaSetDevice(int(sys.argv[2])):
        error = cuda.cudaIpcOpenMemHandle(ctypes.byref(ctypes.c_void_p()), given, 1)
        print(cuda.cudaGetErrorString(error).decode() if error else "")
