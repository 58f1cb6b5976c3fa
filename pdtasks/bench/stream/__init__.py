"""How many tokens a second are relayed, and at what price? `pdtasks bench stream`

A stub engine makes a token for each of many streams in each step; what is measured is all between
it and the bytes at an HTTP client::

    stub            the engine core; in a decode worker of ours, and in vLLM's front end
    without_log     the same, and no attempt is told from another: what going on costs who is not
                    disturbed
    vllm_front      what `vllm serve` runs in front of its engine, with the stub in its place
    client          streams over plain sockets, so that it costs little
    stack           services, workers, API and front end
    run             the order of a run: one side after the other, in short rounds
    report          medians, and ratios of figures of the same round
    command         the defaults
"""
