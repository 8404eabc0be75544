"""`idlm convert`: a gated adapter (R-ISD), or a whole I-DLM, from an AR model of the Qwen3 family and conversations.

The parts that the script of the embedded checkpoint shares (rows, attention, losses, schedule) need torch alone.
"""
