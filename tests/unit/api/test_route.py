"""How does a caller say which way its request is to take?"""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from api.route import RouteWishes, route_wish


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    app.add_middleware(RouteWishes)

    @app.get("/wish")
    async def wish() -> str:
        return str(route_wish())

    return TestClient(app)


@pytest.mark.parametrize("wish", ["split", "whole"])
def test_the_header_counts_for_its_request_alone(client: TestClient, wish: str) -> None:
    assert client.get("/wish", headers={"X-Pdtasks-Route": wish}).json() == wish
    assert client.get("/wish").json() == ""


def test_another_value_is_refused_by_the_headers_name(client: TestClient) -> None:
    response = client.get("/wish", headers={"X-Pdtasks-Route": "fast"})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "X-Pdtasks-Route"
