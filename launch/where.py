"""Where this code lies: in a checkout, whose jobs run the checkout's code, or installed on every machine."""

from pathlib import Path

import stepladder

FOLDER = Path(__file__).parent  # of launch/, with conf/ and the bundled model
CONF = str(FOLDER / "conf")
BUNDLED = FOLDER / "demo_model"
IMPORTED_FROM = Path(stepladder.__file__).parent.parent  # a process that starts here imports this very code
CHECKOUT = IMPORTED_FROM if FOLDER.parent == IMPORTED_FROM else None
JOB_FOLDER = ("--working-dir", str(CHECKOUT)) if CHECKOUT else ()  # for `ray job submit`
