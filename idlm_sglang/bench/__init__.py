"""`idlm bench`: the same requests to several servers of one checkpoint, and what each made of them.

``options`` reads the command, ``arms`` says what to start, ``servers`` starts it, ``prompts`` draws the requests, ``load``
drives one point with SGLang's own load generator, ``one_batch`` times static batches with its one-batch module, ``decoding``
reads the server's counters around them, ``store`` keeps the raw results, ``summary`` turns them into figures with their spread,
``table`` and ``plots`` draw them, ``run`` is the order of it all.
"""
