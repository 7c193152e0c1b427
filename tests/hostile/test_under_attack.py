"""No peer can hurt another: under every attack an honest C-ECHO answers within a second, in 150 MB; after it, peace."""

from __future__ import annotations

import threading
import time

import attacks
import attacks_data
import attacks_tls
import pytest
from attacks import STATES, connected, cut, trickle
from besieged import HONEST, HONEST_AE, Besieged, besieged, siege
from certificates import Authority
from hostile_cases import REQUEST

from dicom_node.config import Tls
from dicom_node.dimse.tls import client_context

pytestmark = pytest.mark.xdist_group("hostile")  # one listener for each kind of node, not one for each worker


@pytest.fixture(scope="module")
def node(tmp_path_factory) -> Besieged:
    with besieged(tmp_path_factory.mktemp("open") / "root", max_instance_mb=100) as made:
        yield made


@pytest.fixture(scope="module")
def impatient(tmp_path_factory) -> Besieged:
    """The same, and it waits for nobody longer than 0.6 s."""
    with besieged(tmp_path_factory.mktemp("impatient") / "root", idle_timeout=0.6) as made:
        yield made


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Besieged:
    """A node that knows its peers."""
    allow = [{"ae_title": HONEST_AE, "address": HONEST}]
    with besieged(tmp_path_factory.mktemp("guarded") / "root", allow=allow) as made:
        yield made


@pytest.fixture(scope="module")
def secure(tmp_path_factory) -> Besieged:
    """Mutual TLS."""
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority(folder)
    pair = {name: authority.issue(name, f"{name}.hospital") for name in ("node", "honest")}
    sections = {name: Tls(cert=cert, key=key, ca=authority.pem) for name, (cert, key) in pair.items()}
    context = client_context(sections["honest"])
    with besieged(folder / "root", tls=context, idle_timeout=5.0, own_tls=sections["node"]) as made:
        yield made


@pytest.mark.parametrize(
    "attack",
    [
        attacks.noise, attacks.endless_requests, attacks.largest_requests, attacks.half_open, attacks.churn,
        attacks.who_never_close, attacks.slow_everywhere, attacks.idle_associations,
        attacks.idle_associations_everywhere, attacks.endless_pdata, attacks.endless_command, attacks.endless_message,
        attacks.crumbs, attacks.giant_instances, attacks.request_flood, attacks.half_closes,
        attacks_data.data_set_bombs, attacks.resets,
    ],
    ids=lambda a: a.__name__,
)  # fmt: skip
def test_an_honest_peer_is_served_and_memory_is_bounded(node, attack):
    watch = siege(node, attack)
    assert watch.echoes >= 2
    assert node.stored() == 0


@pytest.mark.parametrize("attack", [attacks.trickling_data, attacks.deaf], ids=lambda a: a.__name__)
def test_who_makes_no_progress_is_cut(impatient, attack):
    siege(impatient, attack)


@pytest.mark.parametrize("attack", [attacks.half_open_everywhere, attacks.noise], ids=lambda a: a.__name__)
def test_places_are_kept_for_configured_peers(guarded, attack):
    siege(guarded, attack)


@pytest.mark.parametrize(
    "attack",
    [
        attacks_tls.silent, attacks_tls.half_a_hello, attacks_tls.hello_and_silence, attacks_tls.handshake_and_silence,
        attacks_tls.plain_and_noise, attacks_tls.handshakes_and_resets,
    ],
    ids=lambda a: a.__name__,
)  # fmt: skip
def test_who_stalls_in_tls_delays_nobody(secure, attack):
    siege(secure, attack)


@pytest.mark.long
@pytest.mark.parametrize("attack", [attacks_data.bombs_together, attacks.every_named_case], ids=lambda a: a.__name__)
def test_more_of_it_at_once(node, attack):
    siege(node, attack)


IN_AN_ASSOCIATION = [name for name in STATES if STATES[name][0].startswith(REQUEST)]


def test_slow_loris_in_an_association_is_cut_in_whatever_state_it_is(impatient):
    """A byte now and then is no progress: each PDU has to come within idle_timeout."""
    _all_are_cut(impatient, IN_AN_ASSOCIATION, 6.0)


@pytest.mark.long
def test_slow_loris_before_an_association_is_cut(impatient):
    _all_are_cut(impatient, [name for name in STATES if name not in IN_AN_ASSOCIATION], 16.0)


def _all_are_cut(node: Besieged, states: list[str], seconds: float) -> None:
    held = {}
    began = time.monotonic()
    for k, name in enumerate(states):
        first, rest = STATES[name]
        held[name] = s = connected(node, f"127.0.0.{80 + k}")
        if first.startswith(REQUEST):
            s.sendall(REQUEST)
            s.recv(4096)
            first = first[len(REQUEST) :]
        s.sendall(first)
        threading.Thread(target=trickle, args=(s, rest[:-1], max(0.3, seconds / len(rest))), daemon=True).start()
    late = [name for name, s in held.items() if not cut(s, max(0.1, seconds - (time.monotonic() - began)))]
    for s in held.values():
        s.close()
    assert late == []
    node.settles()
