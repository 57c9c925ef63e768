"""The command line. Parses and prints; what it decides stands in dice_py."""
