"""Sets of names, as they read."""


def words(*lines: str) -> frozenset[str]:
    return frozenset(word for line in lines for word in line.split())
