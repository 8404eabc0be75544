"""The live page at ``/idlm`` on the serving port: what the server does now, and how an answer's tokens came."""

PATH = "/idlm"
