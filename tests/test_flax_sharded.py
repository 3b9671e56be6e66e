import os
import pathlib
import subprocess
import sys


def test_sharding_and_its_names_follow_the_stored_elements():
    script = pathlib.Path(__file__).with_name("sharded_flax.py")
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "all good"
