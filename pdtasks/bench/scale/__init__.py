"""Where is the first bottleneck of many GPUs, and what removes it? `pdtasks bench scale`

`live` runs real workers, RabbitMQ, Valkey and API processes with a stub engine that takes a GPU's
times, and says what a request costs each of them; `bus` fills one bus.  `model` goes on from there
by discrete-event simulation, beyond what a host carries::

    gpu         a GPU's times, each with the row that it comes from
    batching    which requests share an engine's step, and how long it takes: stub and model
    stub        the engine of live workers
    stack       services, workers and API processes, step by step more
    live        the order of a live run
    bus         one bus as fast as its real writers and readers can make it
    costs       what a request, a token and a message cost each part
    stations    queues of the simulation
    system      a whole stack of them: API, broker, bus, kv servers, engines
    validate    rows that were measured, beside the same modelled
    bottleneck  which part is full first, by the utilisation law
    sweep       what is asked of the model
    plot        its curves as pictures
    report      what is shown of both parts
    command     where a run has its folder and its files
"""
