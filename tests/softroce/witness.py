#!/usr/bin/env python3
"""Runs the witness, a peer of engines that shares no code with them: `witness.py --help`."""

import runpy
import sys
from pathlib import Path

# The modules beside this file are one package, wherever they are run from.
sys.path[0] = str(Path(__file__).resolve().parent.parent)
runpy.run_module("softroce.witness_main", run_name="__main__")
