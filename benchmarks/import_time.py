"""Time of ``import gradleak`` against ``import torch``, and of ``gradleak --help``, each in a process of its own.

Targets: at most 1.1 times, and at most 0.5 s. The bare import loads nothing until a name is used, so the target is held
against an import and the names that the README's first example uses. The cases take turns, and medians are compared, so
that a slow phase of the machine hits all alike; a first round that fills the file cache does not count. The package's
bytecode is compiled beforehand, as pip does for every package that it installs, torch among them; where Python may not
write bytecode, a source tree would otherwise be compiled anew in every process.
"""

from __future__ import annotations

import compileall
import subprocess
import sys
import time
from pathlib import Path

from _common import arguments, spread, write_result

import gradleak

RATIO, HELP = 1.1, 0.5
CASES = {
    "nothing": ("-c", "pass"),
    "import torch": ("-c", "import torch"),
    "import gradleak": ("-c", "import gradleak"),
    "import gradleak, names of the first example": (
        "-c",
        "import gradleak as gl; gl.models.lenet, gl.Client, gl.Batch, gl.simulate, gl.attacks.auto, gl.metrics.psnr",
    ),
    "gradleak --help": ("-c", "import sys; sys.argv = ['gradleak', '--help']; from gradleak.cli import main; main()"),
}


def seconds(command: tuple[str, ...]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Measure and store the table."""
    options = arguments(__doc__ or "", rounds=7)
    compileall.compile_dir(Path(gradleak.__file__).parent, quiet=1)
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for turn in range(options.rounds + 1):
        for name, command in CASES.items():
            taken = seconds(command)
            if turn:
                times[name].append(taken)
    found = {name: spread(values) for name, values in times.items()}
    rows = [{"what": name, **{f"seconds {k}": v for k, v in values.items()}} for name, values in found.items()]
    ratio, help_ = (
        found["import gradleak, names of the first example"]["median"] / found["import torch"]["median"],
        found["gradleak --help"]["median"],
    )
    summary = [
        {
            "what": "`import gradleak` and the README's first names against `import torch`",
            "target": f"≤ {RATIO} ×",
            "measured": f"{ratio:.2f} ×",
            "met": ratio <= RATIO,
        },
        {"what": "`gradleak --help`", "target": f"≤ {HELP} s", "measured": f"{help_:.2f} s", "met": help_ <= HELP},
    ]
    write_result("import_time", rows, rounds=options.rounds, summary=summary)


if __name__ == "__main__":
    main()
