"""Sizes in bytes as text with units."""

UNITS = {"B": 1}
UNITS |= {f"{prefix}B": 1000 ** (power + 1) for power, prefix in enumerate("KMGT")}
UNITS |= {f"{prefix}iB": 1024 ** (power + 1) for power, prefix in enumerate("KMGT")}


def parse_size(text: str) -> int:
    """Bytes of a size such as "512MiB" or "1.5 GB", a valid `config.job.Size` other than "auto"."""
    number = text.rstrip("BKMGTi").strip()
    return int(float(number) * UNITS[text[len(number) :].strip()])


def format_size(num_bytes: float) -> str:
    """A size as text, such as "1.50 GiB"."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if num_bytes >= UNITS[unit]:
            return f"{num_bytes / UNITS[unit]:.2f} {unit}"
    return f"{num_bytes:.0f} B"
