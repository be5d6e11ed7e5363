"""Every option of the fit, from config to folded weight, against a direct computation over all rows in float64."""
import json
from types import SimpleNamespace

import pytest
import torch

from replaceme.activations import capture
from replaceme.arch import fold_points, layers_of
from replaceme.blocks import Block
from replaceme.core import ReplaceMeError
from replaceme.data import batches, load_texts
from replaceme.evaluate import batch_loss
from replaceme.merge import cut, explicit_map, replace_block
from replaceme.models import tiny_model, tiny_tokenizer
from replaceme.pipeline import prune
from replaceme.search import hold_out
from replaceme.stats import writes

TEXTS = "".join("Line %d of many: the map stands in for %d layers that went, and nobody will miss them. " % (i, i % 7) for i in range(60))
BLOCK = Block(2, 4)
S = 64  # tokens of a text


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.txt"
    path.write_text(TEXTS)
    return str(path)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=6, mlp_bias=False)


@pytest.fixture(scope="module")
def rows(model, data):
    "All rows of the calibration tokens, text by text: `M`, `H`, `S` (at the cut), `Y`, and which are of held-out texts"
    tok = tiny_tokenizer()
    bs = batches(load_texts(data, tokenizer=tok, size=16, max_length=S), tok, 8, S)
    held = hold_out(bs)[1]
    n_held = sum(int(b["attention_mask"].sum()) for b in held)
    M, H, A, Y = [], [], [], []
    for b in bs:
        for i in range(len(b["input_ids"])):
            one = {k: v[i:i + 1, :int(b["attention_mask"][i].sum())] for k, v in b.items()}
            acts = capture(model, one, fold_points(model, [BLOCK.start - 1]))
            M.append(acts.M[1]), H.append(acts.H[1]), A.append(acts.S[2] - acts.M[1]), Y.append(acts.S[4])
    M, H, A, Y = [torch.cat(o).double() for o in (M, H, A, Y)]
    return SimpleNamespace(M=M, H=H, A=A, Y=Y, Q=Y - A, w=1 / Y.norm(dim=1, keepdim=True), fit=slice(0, len(M) - n_held),
                           held=slice(len(M) - n_held, None), batches=bs, held_batches=held)


def run(model, data, **keys):
    return prune(model, tiny_tokenizer(), **{**dict(blocks=[list(BLOCK)], dataset=data, dataset_size=16, max_length=S, refit=0), **keys})


def ridge_solve(X, Q, w, lam, start):
    "Argmin over V of |sqrt(w)(XV-Q)|^2 + lam |V-start|^2 by a general solver on stacked rows"
    r = w.sqrt()
    A = torch.cat([r * X, lam ** 0.5 * torch.eye(X.shape[1]).double()])
    B = torch.cat([r * Q, lam ** 0.5 * start])
    return torch.linalg.lstsq(A, B, driver="gelsd").solution


def mean_diag(X, w):
    return ((w * X) * X).sum(0).mean()


def lower(X, Q):
    T = torch.zeros(X.shape[1], Q.shape[1]).double()
    for j in range(Q.shape[1]):
        T[j:, j] = torch.linalg.lstsq(X[:, j:], Q[:, j], driver="gelsd").solution
    return T


def reduced(X, Q, k):
    T = torch.linalg.lstsq(X, Q, driver="gelsd").solution
    _, _, V = torch.linalg.svd(X @ T, full_matrices=False)
    return T @ V[:k].T @ V[:k]


def procrustes(X, Q):
    U, _, V = torch.linalg.svd(X.T @ Q)
    return U @ V


I32 = torch.eye(32).double()
ONE = 1.0
NARROW = {
    "lstsq": (dict(), lambda r: ridge_solve(r.M, r.Q, ONE + 0 * r.w, 0, I32)),
    "alpha": (dict(alpha=0.1), lambda r: ridge_solve(r.M, r.Q, ONE + 0 * r.w, 0.1, 0 * I32)),
    "ridge": (dict(ridge=0.1), lambda r: ridge_solve(r.M, r.Q, ONE + 0 * r.w, 0.1 * mean_diag(r.M, 1), I32)),
    "inv_norm": (dict(weights="inv_norm"), lambda r: ridge_solve(r.M, r.Q, r.w, 0, I32)),
    "inv_sq_norm": (dict(weights="inv_sq_norm"), lambda r: ridge_solve(r.M, r.Q, r.w ** 2, 0, I32)),
    "diag": (dict(diag=True), lambda r: torch.diag((r.M * r.Q).sum(0) / (r.M ** 2).sum(0))),
    "structure-diag": (dict(structure="diag"), lambda r: torch.diag((r.M * r.Q).sum(0) / (r.M ** 2).sum(0))),
    "two_vectors": (dict(two_vectors=True), lambda r: reduced(r.M, r.Q, 1)),
    "rank": (dict(structure="rank", rank=5), lambda r: reduced(r.M, r.Q, 5)),
    "thri": (dict(thri=True), lambda r: lower(r.M, r.Q)),
    "orthonormal": (dict(structure="orthonormal"), lambda r: procrustes(r.M, r.Q)),
}


def folded_map(small, model, V):
    "How far the folded weight is from `V' W`"
    W0, W = [layers_of(m)[1].mlp.down_proj.weight.double() for m in (model, small)]
    return ((W - V.T @ W0).norm() / (V.T @ W0).norm()).item()


@pytest.mark.parametrize("name", NARROW)
def test_closed_forms(model, data, rows, name):
    keys, direct = NARROW[name]
    small, result = run(model, data, method="lstsq", **keys)
    V = direct(rows)
    assert folded_map(small, model, V) < 2e-3
    error = (rows.M @ V - rows.Q).pow(2)
    w = {"inv_norm": rows.w, "inv_sq_norm": rows.w ** 2}.get(keys.get("weights"), ONE)
    assert result["fit"]["error"] == pytest.approx(((w * error).sum() / (w * rows.Q ** 2).sum()).item(), rel=1e-3)
    assert result["blocks"] == [list(BLOCK)] and result["calibration"]["tokens"] == len(rows.M)


@pytest.mark.parametrize("weights", ["none", "inv_norm"])
def test_wide(model, data, rows, weights):
    small, result = run(model, data, method="lstsq", map="wide", ridge=0.05, weights=weights)
    w = rows.w if weights == "inv_norm" else 1 + 0 * rows.w
    E = layers_of(model)[1].mlp.down_proj.weight.double().T
    T = ridge_solve(rows.M, rows.Q, w, 0, I32)
    V = ridge_solve(rows.H, rows.Q, w, 0.05 * mean_diag(rows.H, w), E @ T)
    W = layers_of(small)[1].mlp.down_proj.weight.double()
    assert ((W - V.T).norm() / V.norm()).item() < 2e-3


def test_affine(model, data, rows):
    small, _ = run(model, data, method="lstsq", affine=True)
    X = torch.cat([rows.M, torch.ones(len(rows.M), 1).double()], 1)
    V = torch.linalg.lstsq(X, rows.Q, driver="gelsd").solution
    down = layers_of(small)[1].mlp.down_proj
    assert folded_map(small, model, V[:-1]) < 2e-3
    assert ((down.bias.double() - V[-1]).norm() / V[-1].norm()).item() < 2e-3
    assert small.config.mlp_bias and not model.config.mlp_bias and layers_of(model)[1].mlp.down_proj.bias is None
    others = [m.bias for i, l in enumerate(layers_of(small)) for n, m in l.mlp.named_children() if hasattr(m, "bias") and (i, n) != (1, "down_proj")]
    assert others and all(not b.any() for b in others)


def test_affine_needs_a_bias(data):
    with pytest.raises(ReplaceMeError, match="affine.*no bias"):
        run(tiny_model("qwen2", layers=6), data, method="lstsq", affine=True)


def test_alpha_auto(model, data, rows):
    small, result = run(model, data, method="lstsq", alpha="auto")
    errors = []
    for lam in result["ridge"]["values"]:
        V = ridge_solve(rows.M[rows.fit], rows.Q[rows.fit], ONE + 0 * rows.w[rows.fit], lam * mean_diag(rows.M[rows.fit], 1), I32)
        errors.append(((rows.M @ V - rows.Q)[rows.held].pow(2).sum() / rows.Q[rows.held].pow(2).sum()).item())
    assert result["ridge"]["errors"] == pytest.approx(errors, rel=1e-2)
    lam = result["ridge"]["chosen"]
    assert lam == result["ridge"]["values"][min(range(len(errors)), key=errors.__getitem__)]
    assert folded_map(small, model, ridge_solve(rows.M, rows.Q, ONE + 0 * rows.w, lam * mean_diag(rows.M, 1), I32)) < 2e-3


def cosine_loss(V, rows, accurate):
    P, Q = (rows.M @ V + rows.A, rows.Y) if accurate else (rows.M @ V, rows.Q)
    return (1 - torch.nn.functional.cosine_similarity(P, Q, dim=1)).mean()


def lbfgs(loss, theta, steps=400):
    "A generic optimiser, far past convergence"
    theta = theta.clone(memory_format=torch.contiguous_format).requires_grad_()
    opt = torch.optim.LBFGS([theta], max_iter=steps, history_size=50, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        value = loss(theta)
        value.backward()
        return value
    opt.step(closure)
    return theta.detach()


@pytest.mark.parametrize("accurate", [False, True])
@pytest.mark.parametrize("solver", ["irls", "l-bfgs", "cg", "trust-ncg", "adam"])
def test_cosine_solvers_lower_the_cosine_loss(model, data, rows, solver, accurate):
    keys = dict(irls=dict(epochs=20), adam=dict(epochs=30, lr=1e-2)).get(solver, dict(epochs=60))
    small, result = run(model, data, method="cosine", solver=solver, accurate=accurate, **keys)
    W0, W = [layers_of(m)[1].mlp.down_proj.weight.double() for m in (model, small)]
    V = torch.linalg.lstsq(W0.T, W.T, driver="gelsd").solution  # the map in the weight: W' = W0' V
    best = cosine_loss(lbfgs(lambda T: cosine_loss(T, rows, accurate), ridge_solve(rows.M, rows.Q, 1 + 0 * rows.w, 0, I32)), rows, accurate)
    start, end = cosine_loss(I32, rows, accurate), cosine_loss(V, rows, accurate)
    within = dict(irls=0.02, adam=0.5).get(solver, 0.15)  # of the way from plain removal to the best there is
    assert end - best < within * (start - best)
    assert len(result["history"]) > 1


def test_released_adam_step(model, data, rows):
    "One epoch of the release's settings: Adam moves every entry by about the rate a step, from the identity"
    small, _ = run(model, data, method="cosine", epochs=1)
    T = I32.clone().requires_grad_()
    opt = torch.optim.Adam([T], lr=1e-4)
    cosine_loss(T, rows, False).backward()  # all tokens are one step of 1024
    opt.step()
    assert len(rows.M) <= 1024
    assert folded_map(small, model, T.detach()) < 1e-4


@pytest.mark.parametrize("structure", ["diag", "lower"])
def test_mse_by_iteration_is_least_squares(model, data, rows, structure):
    a, _ = run(model, data, method="cosine", solver="l-bfgs", loss="mse", structure=structure, epochs=400)
    b, _ = run(model, data, method="lstsq", structure=structure)
    Wa, Wb = [layers_of(m)[1].mlp.down_proj.weight for m in (a, b)]
    assert ((Wa - Wb).norm() / Wb.norm()).item() < 2e-2


def test_penalties(model, data, rows):
    "alpha is the weight of the squared penalty of the solvers; l1 makes a smaller map"
    a, _ = run(model, data, method="cosine", solver="l-bfgs", loss="mse", alpha=1e-3, epochs=300)
    V = ridge_solve(rows.M, rows.Q, 1 + 0 * rows.w, 1e-3 * len(rows.M) / 32, 0 * I32)  # mean over T*32 errors, mean over 32*32 entries
    assert folded_map(a, model, V) < 1e-2
    sizes = []
    for l1 in (1e-5, 3.0):
        small, _ = run(model, data, method="cosine", solver="adam", loss="elasticnet", l1=l1, lr=1e-2, epochs=40)
        sizes.append(layers_of(small)[1].mlp.down_proj.weight.abs().sum().item())
    assert sizes[1] < 0.9 * sizes[0]


def test_rows_on_disk_are_kept_and_used_again(model, data, tmp_path, monkeypatch):
    keys = dict(method="cosine", solver="irls", epochs=3, activations_save_path=str(tmp_path / "acts"))
    a, _ = run(model, data, **keys)
    head = json.loads((tmp_path / "acts/2-4/rows.json").read_text())
    assert head["dtype"] == "float32" and head["rows"] == head["tokens"]
    monkeypatch.setattr("replaceme.shards.batch_rows", lambda *a, **k: pytest.fail("the rows were made again"))
    b, _ = run(model, data, **keys)
    assert torch.equal(*[layers_of(m)[1].mlp.down_proj.weight for m in (a, b)])
    with pytest.raises(ReplaceMeError, match="another belongs.model"):
        run(tiny_model("llama", layers=6, seed=3), data, **keys)


def test_mask(model, data):
    "Hidden tokens are in no sum, and the fit is another one"
    plain, a = run(model, data, method="lstsq")
    hidden, b = run(model, data, method="lstsq", mask=0.25)
    share = b["calibration"]["tokens"] / a["calibration"]["tokens"]
    assert 0.7 < share < 0.8
    assert not torch.equal(*[layers_of(m)[1].mlp.down_proj.weight for m in (plain, hidden)])
    again, _ = run(model, data, method="lstsq", mask=0.25)
    assert torch.equal(*[layers_of(m)[1].mlp.down_proj.weight for m in (again, hidden)])


def test_several_blocks_are_fitted_one_after_the_other(model, data, rows):
    small, result = run(model, data, method="lstsq", blocks=[[4, 5], [1, 2]])
    first = run(model, data, method="lstsq", blocks=[[1, 2]])[0]
    assert result["blocks"] == [[1, 2], [4, 5]] and len(layers_of(small)) == 4
    M, Q = [], []
    for b in rows.batches:  # layer 3 of the dense model is layer 2 behind the first cut; its target is the dense state 5
        a, ref = capture(first, b, fold_points(first, [2])), capture(model, b)
        M.append(a.M[2].double()), Q.append((ref.S[5] - (a.S[3] - a.M[2])).double())
    T = torch.linalg.lstsq(torch.cat(M), torch.cat(Q), driver="gelsd").solution
    W0, W = [layers_of(m)[2].mlp.down_proj.weight.double() for m in (first, small)]
    assert ((W - T.T @ W0).norm() / (T.T @ W0).norm()).item() < 2e-3


def test_num_A_and_max_blocks(model, data):
    keys = dict(blocks=None, dataset_size=16)
    _, one = run(model, data, method="lstsq", layers_to_skip=1, num_A=2, **keys)
    assert sum(e - s for s, e in one["blocks"]) == 2
    _, two = run(model, data, method="lstsq", layers_to_skip=2, max_blocks=2, **keys)
    D = {(s, s + int(n)): d for n, ds in two["distance"]["profile"].items() for s, d in enumerate(ds, 1)}
    ways = [[(s, s + 2)] for s in range(1, 5)] + [[(s, s + 1), (t, t + 1)] for s in range(1, 6) for t in range(s + 2, 6)]
    best = min(ways, key=lambda w: sum(D[b] for b in w))
    assert [tuple(b) for b in two["blocks"]] == best
    _, out = run(model, data, method="auto", layers_to_skip=2, max_blocks=2, top_k=3, **keys)
    assert len(out["choice"]) == 3 and sum(c["chosen"] for c in out["choice"]) == 1
    chosen = next(c for c in out["choice"] if c["chosen"])
    assert chosen["loss"] == min(c["loss"] for c in out["choice"]) and out["blocks"] == chosen["blocks"]
    _, out = run(model, data, method="auto", layers_to_skip=3, max_blocks=3, top_k=3, **keys)
    assert sorted(len(c["blocks"]) for c in out["choice"]) == [1, 2, 3]  # the best of each, and the loss decides between them
    _, D3 = run(model, data, method="lstsq", layers_to_skip=3, max_blocks=3, **keys)
    assert len(D3["blocks"]) == 1 or D3["blocks"] in [c["blocks"] for c in out["choice"]]


@pytest.mark.parametrize("select", ["fit", "loss"])
def test_select(model, data, rows, select):
    "The winner has the smallest held-out error, or its pruned model the smallest held-out loss, by a direct computation"
    _, result = run(model, data, method="lstsq", layers_to_skip=2, blocks=None, select=select, top_k=4)
    values = {}
    for s in range(1, 5):
        M, Q = [], []
        for b in rows.batches:
            a = capture(model, b, fold_points(model, [s - 1]))
            M.append(a.M[s - 1].double()), Q.append((a.S[s + 2] - a.S[s] + a.M[s - 1]).double())
        M, Q = torch.cat(M), torch.cat(Q)
        T = torch.linalg.lstsq(M[rows.fit], Q[rows.fit], driver="gelsd").solution
        small = replace_block(model, Block(s, s + 2), T)
        err = ((M @ T - Q)[rows.held].pow(2).sum() / Q[rows.held].pow(2).sum()).item()
        values[s] = err if select == "fit" else batch_loss(small, rows.held_batches)
    assert result["block"][0] == min(values, key=values.get)
    for c in result["choice"]:
        assert c["fit_error" if select == "fit" else "loss"] == pytest.approx(values[c["blocks"][0][0]], rel=2e-2)


def test_auto_is_the_default(model, data):
    a, ra = prune(model, tiny_tokenizer(), 2, dataset=data, dataset_size=16, max_length=S)
    b, rb = prune(model, tiny_tokenizer(), 2, method="auto", dataset=data, dataset_size=16, max_length=S)
    assert ra["method"] == "auto" and ra["fit"]["map"] == "wide" and ra["fit"]["weights"] == "inv_norm"
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert len(ra["choice"]) == 4  # all blocks of two of six layers


def sink_model():
    "Layer 2 writes a huge vector at the first token"
    model = tiny_model("llama", layers=8)
    layer = layers_of(model)[2]

    def hook(mod, args, out):
        out = out.clone()
        out[:, 0] += 300 * torch.nn.functional.one_hot(torch.tensor(0), 32)
        return out
    layer.mlp.register_forward_hook(hook)
    return model


def test_a_block_with_the_sink_is_avoided_unless_allowed(data):
    keys = dict(method="lstsq", layers_to_skip=3, blocks=None)
    _, free = run(sink_model(), data, sinks="allow", **keys)
    assert free["distance"]["sinks"].keys() == {2}
    _, safe = run(sink_model(), data, **keys)
    assert not safe["block"][0] <= 2 < safe["block"][1]
    nearer = [[s, s + 3] for s, d in enumerate(safe["distance"]["profile"]["3"], 1) if d < safe["distance"]["value"]]
    assert sorted(safe["distance"]["avoided"]) == nearer


def test_a_loss_that_is_not_finite_never_wins(model, data, monkeypatch):
    losses = iter([float("nan"), 3.0, 2.0, 4.0])
    monkeypatch.setattr("replaceme.search.batch_loss", lambda *a, **k: next(losses))
    _, result = run(model, data, method="lstsq", layers_to_skip=2, blocks=None, select="loss", top_k=4)
    assert [c["loss"] for c in result["choice"] if c["chosen"]] == [2.0]


@pytest.mark.parametrize("family", ["llama", "granite", "gpt2", "opt", "gpt_neox", "phi3"])
@torch.no_grad()
def test_wide_and_affine_folds_are_exact(family):
    model = tiny_model(family, layers=6)
    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    p = fold_points(model, [1])[1]
    E, gen = writes(p), torch.Generator().manual_seed(2)
    V = E + 0.3 * E.std() * torch.randn(E.shape, generator=gen).double()
    fits = [SimpleNamespace(T=V, kind="wide", affine=False)]
    if p.module.bias is not None:
        fits.append(SimpleNamespace(T=torch.cat([V, torch.randn(1, 32, generator=gen).double()]), kind="wide", affine=True))
        fits.append(SimpleNamespace(T=torch.cat([I32, 0.1 * torch.randn(33, 32, generator=gen).double()[:1]]), kind="narrow", affine=True))
    for fit in fits:
        with explicit_map(cut(model, [BLOCK]), 1, fit) as m:
            ref = m(ids).logits
        out = replace_block(model, BLOCK, fit)(ids).logits
        assert ((out - ref).norm() / ref.norm()).item() < 1e-5
        assert ((replace_block(model, BLOCK, None)(ids).logits - ref).norm() / ref.norm()).item() > 1e-3
