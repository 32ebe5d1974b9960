"""For test_world.py: python print_name.py NAME prints a file's name as the commands do, whatever bytes it has."""
import sys

from runtime import command  # noqa: F401  (it sets how names are printed)

print(sys.argv[1])
