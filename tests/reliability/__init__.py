"""The reliability campaign: kills, full disks, flipped bits, bad input, concurrent runs.

docs/reliability.md says what is promised. The long part is marked ``campaign``; `make campaign`
runs it.
"""
