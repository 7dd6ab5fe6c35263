"""Verify and Search agree bit for bit, whichever way the image comes and however it is asked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedding.decision import distance
from lookalike.v1 import common_pb2, gallery_pb2, match_pb2, search_pb2
from tests.service.harness import DIM, Stubs, encoded, stored

_serial = itertools.count()

vectors = st.lists(
    st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).standard_normal(DIM)),
    min_size=1,
    max_size=4,
).map(lambda rows: [(row / np.linalg.norm(row)).astype("<f4").tobytes() for row in rows])


def matters(decision: common_pb2.Decision) -> bytes:
    """All that a decision says, bit for bit."""
    return decision.SerializeToString(deterministic=True)


def forms(stubs: Stubs, gallery: str, names: Sequence[str]) -> dict[str, list[common_pb2.ImageInput]]:
    """Each item as its name and as its embedding, and as its image where the name is that of one."""
    inputs: dict[str, list[common_pb2.ImageInput]] = {}
    for name in names:
        item = stored(gallery, name)
        embedding = stubs.match.Embed(match_pb2.EmbedRequest(image=item)).embedding
        inputs[name] = [item, common_pb2.ImageInput(embedding=embedding)]
        if name.startswith("image-"):
            inputs[name].append(encoded(int(name.removeprefix("image-"))))
    return inputs


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seeds=st.lists(st.integers(0, 50), min_size=1, max_size=4, unique=True),
    embeddings=vectors,
    at=st.integers(0, 10**6),
    band=st.sampled_from([0.0, 0.05]),
)
def test_verify_and_search_agree_bit_for_bit(
    stubs: Stubs, seeds: list[int], embeddings: list[bytes], at: int, band: float
) -> None:
    gallery = f"agree-{next(_serial)}"
    images = {f"image-{seed}": encoded(seed) for seed in seeds}
    given_vectors = {f"vector-{i}": common_pb2.ImageInput(embedding=values) for i, values in enumerate(embeddings)}
    stubs.fill(gallery, images | given_vectors)
    inputs = forms(stubs, gallery, [*images, *given_vectors])

    # A threshold that is one of the distances, where a verdict would flip at the slightest disagreement.
    held = [np.frombuffer(forms_of[1].embedding, "<f4") for forms_of in inputs.values()]
    between = [float(distance(a_D, b_D)) for a_D, b_D in itertools.product(held, held)]
    point = common_pb2.OperatingPoint(threshold=between[at % len(between)], uncertain_within=band)

    pairs = [(a, b) for a, b in itertools.product(inputs, inputs) if a != b]
    verified = {}
    for a, b in pairs:
        asked = [
            match_pb2.VerifyRequest(a=form_a, b=form_b, operating_point=point)
            for form_a, form_b in itertools.product(inputs[a], inputs[b])
        ]
        single = {matters(stubs.match.Verify(request).decision) for request in (asked[0], asked[-1])}
        batch = stubs.match.BatchVerify(
            match_pb2.BatchVerifyRequest(
                pairs=[match_pb2.ImagePair(a=request.a, b=request.b) for request in asked], operating_point=point
            )
        )
        together = {matters(result.decision) for result in batch.results}
        assert len(single) == 1
        assert together == single
        (verified[a, b],) = single
        if (b, a) in verified:
            assert verified[a, b] == verified[b, a], "swapping the two changes no bit"

    queries = [(name, form) for name, forms_of in inputs.items() for form in forms_of]
    options = {"gallery": f"galleries/{gallery}", "k": 100, "operating_point": point}
    batch = stubs.search.BatchSearch(search_pb2.BatchSearchRequest(queries=[form for _, form in queries], **options))
    for (name, form), result in zip(queries, batch.results, strict=True):
        alone = stubs.search.Search(search_pb2.SearchRequest(query=form, **options))
        assert alone.neighbors == result.neighbors.neighbors
        found = {neighbor.item.rpartition("/")[2]: matters(neighbor.decision) for neighbor in alone.neighbors}
        assert {other: found[other] for other in inputs if other != name} == {
            other: verified[name, other] for other in inputs if other != name
        }
    stubs.galleries.DeleteGallery(gallery_pb2.DeleteGalleryRequest(name=f"galleries/{gallery}", force=True))
