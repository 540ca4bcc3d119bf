"""Whether an answer is right: GSM8K's by its number, HumanEval's by its tests in a process of their own."""

import ctypes
import re
import resource
import subprocess
import sys
import tempfile
from typing import Any

SECONDS, MEGABYTES = 10, 1024
_NEW_USER, _NEW_NET = 0x10000000, 0x40000000
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_NO_SOCKETS = """import sys
def _refuse(event, _):
    if event.startswith("socket.") or event in ("subprocess.Popen", "os.system", "os.fork", "os.exec"):
        raise PermissionError(event)
sys.addaudithook(_refuse)
"""


def number_is_right(text: str, answer: str) -> bool:
    """Whether the last boxed number of the text, or its last number, is the answer's."""
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    places = _NUMBER.findall(boxed[-1] if boxed else text)
    wanted = _NUMBER.findall(answer)
    return bool(places and wanted) and _value(places[-1]) == _value(wanted[-1])


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def program(text: str, task: dict[str, Any]) -> str:
    """The answer's code with the task's tests behind it. task: prompt, entry_point and test of HumanEval."""
    blocks = _FENCE.findall(text)
    named = [block for block in blocks if f"def {task['entry_point']}" in block]
    code = (named or blocks or [text])[0]
    # What the answer calls but leaves out, imports say, stands in the task's own beginning.
    head = task["prompt"].split("def ", 1)[0] if named else task["prompt"]
    return f"{head}\n{code}\n{task['test']}\ncheck({task['entry_point']})\n"


def passes(source: str, seconds: int = SECONDS) -> bool:
    """Whether a program ends well, in a new interpreter: an empty folder and environment, limits of time and
    memory, no network, no files to write, no other processes."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _NO_SOCKETS + source],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=2 * seconds,
                preexec_fn=lambda: _limit(seconds),
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


def _limit(seconds: int) -> None:
    size = MEGABYTES * 2**20
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: size,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))
    # Where the system lets us, the process has a network without any interface; sockets are refused anyway.
    ctypes.CDLL(None).unshare(_NEW_USER | _NEW_NET)
