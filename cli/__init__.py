"""The command line: parses options and prints results. The work is in dice_py."""
