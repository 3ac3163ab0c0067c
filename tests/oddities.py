"What tests with hypothesis share: how many cases they try, and JSON with one odd value."

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# sizes that would take all memory before anything could be compared are left out
ODD = (None, -1, 0, 3, 10**30, 1.5, 1e308, True, '', 'oak', [], {}, ['x'], [1, 'a'])


def property_of(cases, share=1):
    "Settings of a test with so many cases, or with that share of `DIFFII_DAMAGE`."
    long_form = os.environ.get('DIFFII_DAMAGE')
    return settings(
        max_examples=max(1, int(int(long_form) * share)) if long_form else cases,
        deadline=None,
        derandomize='DIFFII_DAMAGE' not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def changed(data, value, odd=ODD):
    "A value of JSON with one thing in it changed, or gone."
    if isinstance(value, dict) and value and data.draw(st.integers(0, 4)):
        key = data.draw(st.sampled_from(sorted(value)))
        if data.draw(st.integers(0, 3)) == 0:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: changed(data, value[key], odd)}
    if isinstance(value, list) and value and data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(value) - 1))
        return [changed(data, v, odd) if i == place else v for i, v in enumerate(value)]
    return data.draw(st.sampled_from(odd))
