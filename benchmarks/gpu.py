"""All that is to be seen on a GPU, in one go: the tests marked gpu, then each benchmark in its shape for a GPU.

    python -m benchmarks.gpu [--only tests,train,evaluate,generate] [--out benchmarks/results] [--limit 540]

What each of them says goes to the terminal, and its last line, one of JSON, to <out>/<name>_gpu.json. One that fails or
takes longer than the limit does not stop the others; the last line has each one's exit status (124: the limit).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

COMMANDS = {
    "tests": "-m pytest -q -m gpu tests",
    "train": "-m benchmarks.train --shape 7b --pairs 64",
    "evaluate": "-m benchmarks.evaluate --shape 7b --device cuda --limit 100",
    "generate": "-m benchmarks.generate --shape 7b --device cuda --dtype bfloat16 --slots 64,128,256,512 --prompts 1024 "
    "--reference-prompts 64 --repeats 1",
}  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", default=",".join(COMMANDS), help="default: %(default)s")
    arguments.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments.add_argument("--limit", type=int, default=540, help="seconds for each (default: %(default)s)")
    options = arguments.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(COMMANDS):
        raise SystemExit(f"--only knows {', '.join(COMMANDS)}, not {', '.join(unknown)}")
    options.out.mkdir(parents=True, exist_ok=True)
    ended = {}
    for name in names:
        print(f"{name}: {COMMANDS[name]}", flush=True)
        lines = []
        command = ["timeout", str(options.limit), sys.executable, "-u", *COMMANDS[name].split()]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
        ended[name] = process.returncode
        if lines and lines[-1].startswith("{"):
            (options.out / f"{name}_gpu.json").write_text(json.dumps(json.loads(lines[-1]), indent=2) + "\n")
    print(json.dumps({"name": "gpu", "exit status": ended}))
    raise SystemExit(any(ended.values()))


if __name__ == "__main__":
    main()
