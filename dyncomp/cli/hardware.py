"""``dyncomp hardware``."""

from __future__ import annotations

import click

from dyncomp.cli import options


@click.command("hardware")
@options.as_json
def command(json_: bool) -> None:
    """Show this machine: cores, vector instructions, memory, devices that ONNX Runtime can use, and by threads the bytes a second that it
    reads and the operations a second of a product of float32 matrices. Measured once, and kept in the cache folder, unless other programs
    have the cores meanwhile."""
    from dataclasses import asdict

    from dyncomp.backends.ort.providers import usable_devices
    from dyncomp.hardware import detect, probe
    from dyncomp.report.tables import show, table

    machine, found, devices = detect(), probe(), usable_devices()
    if json_:
        options.print_json(asdict(machine) | {"devices": devices} | asdict(found))
        return
    vector = ", ".join(machine.vector) or machine.architecture
    result = table(f"{machine.cpu} ({vector}), {machine.memory_bytes / 2**30:.1f} GiB", ">threads", ">GB/s read", ">GFLOP/s")
    for threads, bandwidth in found.bandwidth.items():
        result.add_row(f"{threads}", f"{bandwidth / 1e9:.1f}", f"{found.peak[threads] / 1e9:.0f}")
    busy = ["other programs had the cores meanwhile: these figures are too low, and were not kept"] if found.disturbed else []
    show(result, f"devices: {', '.join(devices)}", *busy)
