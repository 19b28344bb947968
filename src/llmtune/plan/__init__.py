"""What a run will need, before it starts: exact steps, memory by part, disk, time, and what to change where it does not
fit.
"""
