"""`idlm parity`: the same requests to a baseline and to a candidate, answers, fields, distributions and speed compared."""
