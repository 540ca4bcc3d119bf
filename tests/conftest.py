"""What holds for every test: no network, no contest for cores."""

import os

# Set before torch starts its threads: spinning threads on shared cores make everything crawl.
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["OMP_NUM_THREADS"] = "1"
# Compiling takes seconds; the tests of compiled code ask for it.
os.environ["ORTHRUS_RUNNER"] = "eager"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
