from .helpers import run_on_four_devices


def test_sharding_and_its_names_follow_the_stored_elements():
    run_on_four_devices("sharded_flax.py")
