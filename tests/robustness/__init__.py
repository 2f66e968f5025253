"""Campaigns against the real command line: malformed inputs, kills and failures at every step.

Everything runs in children that are forked from one process which has imported all libraries and runs one thread. Run a campaign with
``python -m tests.robustness --help`` or ``make fuzz``; some of them run in the ordinary test suite.
"""
