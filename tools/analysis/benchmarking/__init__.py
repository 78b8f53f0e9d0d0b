"""Time, memory and cost of networks, for the tools in the folder above."""
