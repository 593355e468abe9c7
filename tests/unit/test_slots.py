"""Places on a cluster: where there is a GPU only GPUs count, and none is hidden from a crew that needs a spare."""

from typing import Any

import pytest

from actors.errors import FleetError
from actors.settings import TimeoutConfig
from orchestrator.config import FleetConfig
from orchestrator.fleet import Crew
from orchestrator.slots import Slot, slots_on


def ray_node(name: str, *, cpus: int = 0, gpus: int = 0, alive: bool = True, **labels: str) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}, "Labels": labels}


def slots(*nodes: dict[str, Any], embedded: bool = False, **config: Any) -> list[Slot]:
    return slots_on(nodes, FleetConfig(**config), embedded=embedded)


def test_a_head_without_a_gpu_is_no_place_among_gpus() -> None:
    found = slots(ray_node("b", cpus=8, gpus=2), ray_node("a", cpus=4), ray_node("c", cpus=4, gpus=1))
    assert [(slot.node, slot.ray_node_id, slot.num_gpus) for slot in found] == [
        ("node-0", "b", 1),
        ("node-1", "b", 1),
        ("node-2", "c", 1),
    ]
    assert found[0].num_threads == 4


def test_without_gpus_each_node_that_has_a_cpu_is_one_place() -> None:
    found = slots(ray_node("a"), ray_node("b", cpus=4), ray_node("c", cpus=2), ray_node("d", cpus=2, alive=False))
    assert [(slot.ray_node_id, slot.num_gpus, slot.num_threads) for slot in found] == [("b", 0, 4), ("c", 0, 2)]


def test_spares_beyond_what_is_wanted_are_listed() -> None:
    assert len(slots(ray_node("a", cpus=1), ray_node("b", cpus=1), ray_node("c", cpus=1), nodes=2)) == 3


def test_a_spare_takes_the_place_of_a_node_that_does_not_come_up(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = Crew("demo", lambda: slots(*(ray_node(name, cpus=1) for name in "abc")), 2, TimeoutConfig())
    assert crew.nodes == ("node-0", "node-1")

    def launch(crew: Crew) -> dict[str, FleetError]:
        return {slot.node: FleetError("it hangs") for slot in crew._slots.values() if slot.ray_node_id == "a"}

    monkeypatch.setattr(Crew, "_forget_lost", lambda crew: None)
    monkeypatch.setattr(Crew, "_launch", launch)
    crew.revive()
    assert {slot.ray_node_id for slot in crew._slots.values()} == {"b", "c"}
    assert set(crew.nodes) == {"node-0", "node-1"}


def test_a_machine_of_its_own_has_as_many_places_as_asked() -> None:
    assert len(slots(ray_node("a", cpus=2), embedded=True)) == 4
    found = slots(ray_node("a", cpus=4), embedded=True, nodes=2)
    assert [(slot.num_threads, slot.num_sharing) for slot in found] == [(2, 2), (2, 2)]


def test_a_price_is_the_nodes_own_or_its_regions() -> None:
    nodes = [ray_node("a", cpus=1, region="eu"), ray_node("b", cpus=1, region="eu", price="2.5")]
    assert [slot.offer.price_per_hour for slot in slots(*nodes, region_prices={"eu": 1.5})] == [1.5, 2.5]
    with pytest.raises(FleetError, match="label price is 'dear'"):
        slots(ray_node("a", cpus=1, price="dear"))
