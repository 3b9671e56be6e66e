from .helpers import run_on_four_devices


def test_sharded_arrays_keep_their_sharding():
    run_on_four_devices("sharded_conversion.py")
