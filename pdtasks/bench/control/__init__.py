"""What do publishing, hops and results cost beside a stock Celery chain? `pdtasks bench control`

Both sides run on the same broker and bus, with the same numbers of worker processes and threads,
carry the same prompts and compute nothing::

    stub           an engine core that answers at once: pdtasks's workers are the product's else
    our_client     asks as the API does: `PipelineCore`, publisher and reply stream
    celery_app     the stock side: an app of two tasks
    celery_client  asks with `chain(prefill.s(…), decode.s()).apply_async().get()`
    orders         how a client process is told what to do
    load           what both clients do with an order
    stack          services, workers and clients of both sides
    run            the order of a run: one side after the other, in short rounds
    report         medians, and the ratios of the same round
    command        the defaults
"""
