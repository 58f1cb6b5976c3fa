"""What do Prometheus and vLLM's dashboards find while the stack is at work?"""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.acceptance.running_stack import MODEL, Stack
from tests.scraping import Samples, complaints, families, samples, scrape
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
LONG: dict[str, Any] = {
    "model": MODEL,
    "prompt": "canary: tell me a long story about a whale. " * 36,  # some blocks of KV
    "max_tokens": 1500,
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
}


def total(found: Samples, name: str, **labels: str) -> float:
    """Sum of a metric's samples that have `labels`."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        value
        for sample, value in found.items()
        if sample.partition("{")[0] == name and all(label in sample for label in wanted)
    )


def test_every_part_tells_what_it_does_while_it_does_it(stack: Stack, client: httpx.Client) -> None:
    # Given where Prometheus finds everybody
    groups = client.get("/pdtasks/targets").json()
    at = {group["labels"]["role"]: group["targets"][0] for group in groups}
    assert set(at) == {"prefill", "decode", "api"}
    api = stack.api_url.removeprefix("http://")

    def told() -> Samples:
        return samples(scrape(api))

    before = told()
    running = "vllm:num_requests_running"

    # When answers are under way
    def stream() -> None:
        # Again and again: a fast machine is done before the log has its line.
        with stack.client() as caller:
            while not done:
                with caller.stream("POST", "/v1/completions", json=LONG) as answer:
                    for _ in answer.iter_lines():
                        if done:
                            return

    done: list[bool] = []
    with ThreadPoolExecutor(3) as callers:
        streams = [callers.submit(stream) for _ in range(3)]
        try:
            # Then vLLM's dashboards see them run, each once
            wait_until(lambda: total(told(), running) == 3)
            wait_until(lambda: total(told(), "vllm:kv_cache_usage_perc") > 0)
            wait_until(lambda: total(told(), "vllm:num_requests_waiting") == 0)
            # and so does the log
            wait_until(lambda: re.search(r"Running: [1-3] reqs", stack.log("api1")))

            # and the decode engine says that it has them
            def decode_has_them() -> bool:
                decode = samples(scrape(at["decode"]))
                names = ("pdtasks_engine_running_requests", "pdtasks_worker_stages")
                return [decode[name] for name in names] == [3, 3]

            wait_until(decode_has_them)
            texts = [scrape(address) for address in (api, *at.values())]
        finally:
            done.append(True)
    for one in streams:
        one.result()

    # and every part was as promtool wants it, without a word of a prompt
    for text in texts:
        assert complaints(text) == []
        assert "canary" not in text
    # and nothing runs any more
    wait_until(lambda: total(told(), running) == 0)
    # What the engines looked up has reached the API, prompts once although two stages did
    queries = "vllm:prefix_cache_queries_total"
    prompt_tokens = "vllm:prompt_tokens_total"

    def since(name: str) -> float:
        return total(told(), name) - total(before, name)

    # (A request that was left before its first token counts in the former alone.)
    wait_until(lambda: 0 < since(prompt_tokens) <= since(queries) < 2 * since(prompt_tokens))
    # and who asks the same again is found to find it
    hits = "vllm:prefix_cache_hits_total"
    client.post("/v1/completions", json=LONG | {"max_tokens": 1, "stream": False})
    wait_until(lambda: since(hits) > 0)
    after = told()
    by_source = "vllm:prompt_tokens_cached_by_source_total"
    assert total(after, by_source, source="device") == total(after, hits)
    assert total(after, "pdtasks_first_to_second_token_seconds_count") >= 3


def test_vllms_dashboards_find_every_name_that_its_server_has(stack: Stack) -> None:
    text = scrape(stack.api_url.removeprefix("http://"))

    (info,) = (line for line in text.splitlines() if line.startswith("vllm:cache_config_info{"))
    blocks = re.search(r'num_gpu_blocks="(\d+)"', info)
    assert blocks is not None
    assert int(blocks[1]) > 0
    # Names of Grafana's dashboard in vLLM's own repository (examples/observability).
    assert families(text) >= {
        "vllm:cache_config_info",
        "vllm:e2e_request_latency_seconds",
        "vllm:generation_tokens_total",
        "vllm:inter_token_latency_seconds",
        "vllm:kv_cache_usage_perc",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:prefix_cache_hits_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prompt_tokens_total",
        "vllm:request_decode_time_seconds",
        "vllm:request_generation_tokens",
        "vllm:request_prefill_time_seconds",
        "vllm:request_prompt_tokens",
        "vllm:request_queue_time_seconds",
        "vllm:request_success_total",
        "vllm:time_to_first_token_seconds",
    }


def test_each_metric_of_rules_and_dashboard_is_there(stack: Stack, client: httpx.Client) -> None:
    groups = client.get("/pdtasks/targets").json()
    addresses = [group["targets"][0] for group in groups]
    urls = [stack.api_url, stack.other_api_url]
    assert {url.removeprefix("http://") for url in urls} <= set(addresses)
    there = set().union(*(families(scrape(address)) for address in addresses))

    asked = [ROOT / "deploy" / name for name in ("prometheus/alerts.yml", "grafana/pdtasks.json")]
    named = {
        name.removesuffix("_bucket")
        for file in asked
        for name in re.findall(r"\b(?:pdtasks_|vllm:)[a-z0-9_]+", file.read_text())
    }
    assert len(named) > 30
    assert sorted(named - there) == []


def test_the_command_prints_what_prometheus_needs(stack: Stack) -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "pdtasks.cli", "metrics"],
        env=stack.env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    (found,) = yaml.safe_load(printed)["scrape_configs"]
    urls = [stack.api_url, stack.other_api_url]
    assert [one["url"] for one in found["http_sd_configs"]] == [
        f"{url}/pdtasks/targets" for url in urls
    ]
