"""What holds for every test: no network, no contest for cores."""

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell sets this for background jobs. The programs that tests start would inherit it, and ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Set before torch starts its threads: spinning threads on shared cores make everything crawl.
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["OMP_NUM_THREADS"] = "1"
# Compiling takes seconds; the tests of compiled code ask for it.
os.environ["ORTHRUS_RUNNER"] = "eager"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
