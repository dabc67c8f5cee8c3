import pytest

from tests.worlds import mesh_of
from tokenrec.config import ModelConfig
from tokenrec.errors import InputError
from tokenrec.models.backbones.mesh_check import check_mesh


@pytest.mark.parametrize(
    ("sizes", "model", "field"),
    [
        ((1, 1, 4), {"heads": 2}, "model.heads=2 does not split over mesh.tensor=4"),
        ((1, 8, 1), {"width": 20}, "model.width=20 does not split over mesh.fsdp=8"),
        (
            (2, 1, 2),
            {"ffn_width": 33},
            "model.ffn_width=33 does not split over mesh.tensor=2",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused(sizes, model, field):
    check_mesh(ModelConfig(width=32, heads=4), mesh_of(*sizes))
    with pytest.raises(InputError, match=field):
        check_mesh(ModelConfig(**{"width": 32, "heads": 4} | model), mesh_of(*sizes))
