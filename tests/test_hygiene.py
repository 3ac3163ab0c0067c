"What the source may not do: run what it reads, or hand words to a shell."

import ast

import pytest

FORBIDDEN = ('eval', 'exec', 'compile', '__import__')
SHELLS = ('os.system', 'os.popen', 'subprocess.getoutput', 'subprocess.getstatusoutput')
PICKLES = ('pickle.load', 'pickle.loads', 'joblib.load', 'yaml.load', 'marshal.loads')


@pytest.fixture(scope='module')
def calls(root):
    "Every call in the package and its tools: (where, name, keywords)."
    found = []
    for file in sorted([*root.glob('diffii/**/*.py'), *root.glob('tools/*.py')]):
        for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call):
                where = f'{file.relative_to(root)}:{node.lineno}'
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                found.append((where, ast.unparse(node.func), given))
    return found


def test_there_are_calls_to_look_at(calls):
    assert any(name == 'torch.load' for _, name, _ in calls)
    assert any(name == 'subprocess.run' for _, name, _ in calls)


@pytest.mark.parametrize('names', (FORBIDDEN, SHELLS, PICKLES))
def test_no_call_runs_what_it_is_given(calls, names):
    assert [where for where, name, _ in calls if name in names] == []


def test_torch_files_are_read_as_tensors_alone(calls):
    unsafe = [
        where
        for where, name, given in calls
        if name == 'torch.load' and given.get('weights_only') != 'True'
    ]
    assert unsafe == []


@pytest.mark.parametrize('name', ('trust_remote_code', 'shell', 'allow_pickle'))
def test_no_call_trusts_code_from_elsewhere(calls, name):
    trusting = [
        where for where, _, given in calls if given.get(name, 'False') != 'False'
    ]
    assert trusting == []
