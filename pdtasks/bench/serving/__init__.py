"""How does serving compare, pdtasks beside vLLM's own ways? `pdtasks bench serving PLAN`

::

    plan        what can be started and what is asked of it: a YAML file
    processes   a topology's processes: vLLM servers, proxies, `pdtasks up`
    proxy       what stands in front of several vLLM servers, a process of its own
    client      an open-loop client that knows the gap between first and second token
    vllm_client the same load from vLLM's own client
    exact       is every answer what one engine would have said?
    devices     what the GPUs did meanwhile
    rows        figures of one workload, as table and JSON
    plot        the figures as pictures
    run         one topology after the other, within a time
"""
