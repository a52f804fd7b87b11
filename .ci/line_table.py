"""Prints lines of Python per room: source beside tests, and the longest file, so that growth is seen at once."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("cluster", "workers", "router", "kernels", "deploy", "tensorweave/llmapi", "tensorweave/cli")


def count(files: list[Path]) -> tuple[int, int, str]:
    """Lines that are not blank, the longest file's lines, and that file."""
    lengths = {
        path: sum(bool(line.strip()) for line in path.read_text(encoding="utf-8").splitlines()) for path in files
    }
    if not lengths:
        return 0, 0, "-"
    longest = max(lengths, key=lambda path: (lengths[path], path))
    return sum(lengths.values()), lengths[longest], str(longest.relative_to(ROOT))


def main() -> None:
    print(f"{'room':<20}{'files':>7}{'lines':>8}{'test lines':>12}  longest file")
    total_files = total_lines = 0
    for room in ROOMS:
        files = sorted((ROOT / room).rglob("*.py"))
        lines, most, longest = count(files)
        test_lines, _, _ = count(sorted((ROOT / "tests" / Path(room).name).rglob("*.py")))
        total_files, total_lines = total_files + len(files), total_lines + lines
        print(f"{room:<20}{len(files):>7}{lines:>8,}{test_lines:>12,}  {most:>4} {longest}")
    all_tests, _, _ = count(sorted((ROOT / "tests").rglob("*.py")))
    print(f"{'all':<20}{total_files:>7}{total_lines:>8,}{all_tests:>12,}")


if __name__ == "__main__":
    main()
