"""The laws are collected in the process of the pretend GPU only: it must be loaded before torch is."""

import sys

collect_ignore = [] if "pretend.machine" in sys.modules else ["laws", "pretend"]
