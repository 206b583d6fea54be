"""Tests: `python -m pytest -q test_model.py`. Nothing is downloaded; what needs a missing package is skipped."""
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import config
import model as model_file
from config import UserError
from model import Attention, Packing, RMSNorm, VLM, rope_tables, rotate, self_mask

TINY = dict(image_size=32, patch_size=8, stem_width=8, vision_dim=32, vision_layers=2, vision_heads=2,
            vision_ffn_dim=64, text_dim=32, text_layers=2, text_heads=4, text_kv_heads=2, text_head_dim=8,
            text_ffn_dim=48, max_text=24)
V = 50           # words of the tiny vocabulary


def tiny(**changes):
    """A small model in eval mode with seeded weights; changes: settings other than TINY."""
    torch.manual_seed(0)
    return VLM(config.from_args([], **{**TINY, **changes}), V).eval()


def pictures(count, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def words(*shape, seed=2):
    """Random tokens without [PAD]."""
    return torch.randint(3, V, shape, generator=torch.Generator().manual_seed(seed))


def padded(lengths, left=False, seed=3):
    """Rows (N, longest) of random words of those lengths, padded to the right or to the left."""
    rows = words(len(lengths), max(lengths), seed=seed)
    for row, length in zip(rows, lengths):
        pads = slice(0, max(lengths) - length) if left else slice(length, None)
        row[pads] = 0
    return rows


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


# ---- model: shapes ----
@pytest.mark.parametrize("change", [{}, dict(stem="patch"), dict(vision_positions="sincos"), dict(ffn="swiglu"),
                                    dict(text_kv_heads=1), dict(text_kv_heads=4), dict(patch_size=16)])
def test_shapes(change):
    model = tiny(**change)
    P = (32 // model.cfg.patch_size) ** 2
    images, tokens = pictures(2), words(2, 3, 7)
    logits, attn = model(images, tokens, return_attn=True)
    assert logits.shape == (2, 3, 7, V) and logits.dtype == torch.float32
    assert model(images, tokens[:, 0]).shape == (2, 7, V)
    assert {k: tuple(v.shape) for k, v in attn.items()} == {
        "vision": (2, 2, 2, P, P), "self": (2, 6, 4, 7, 7), "cross": (2, 6, 4, 7, P)}
    features = model.features(images)
    assert list(features) == ["stem", "block0", "block1", "encoder", "projected"]
    assert all(x.shape == (2, P, 32) for x in features.values())
    close(features["projected"], model.encode(images))
    loss, attn = model(images, tokens, tokens, return_attn=True)
    assert loss.shape == () and attn["cross"].requires_grad


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_patches_run_row_by_row(positions):
    model, images = tiny(stem="patch", vision_positions=positions), pictures(1)
    before = model.features(images)["stem"]
    images[:, :, 8:16, 24:] += 1                          # second row, last column of the 4 x 4 patches
    changed = (model.features(images)["stem"] - before).abs().sum(-1)[0] > 1e-3
    assert changed.nonzero().flatten().tolist() == [7]
    grid = model_file.sincos_2d(4, 32).view(4, 4, 2, 16)  # first half: the column, second half: the row
    assert torch.equal(grid[0, :, 0], grid[3, :, 0]) and torch.equal(grid[:, 0, 1], grid[:, 3, 1])
    assert torch.pdist(grid.flatten(0, 1).flatten(1)).min() > 0.1


def test_wrong_shapes_are_named():
    model = tiny()
    with pytest.raises(ValueError, match="32, 32"):
        model(pictures(1, 40), words(1, 1, 4))
    with pytest.raises(ValueError, match="25 tokens exceeds max_text=24"):
        model(pictures(1), words(1, 1, 25))
    with pytest.raises(ValueError, match="exceed max_text=24"):
        model.generate(pictures(1), words(1, 1, 20), 5)


# ---- model: masks and padding ----
def test_causality():
    model, images, tokens = tiny(), pictures(1), words(1, 1, 10)
    before = model(images, tokens)
    tokens[..., 6] = (tokens[..., 6] - 2) % (V - 3) + 3
    after = model(images, tokens)
    close(before[:, :, :6], after[:, :, :6], 1e-6)
    assert (before[:, :, 6:] - after[:, :, 6:]).abs().amax(-1).min() > 1e-3


def test_self_mask_by_hand():
    real = torch.tensor([[0, 1, 1], [1, 1, 0]]).bool()
    want = torch.tensor([[[1, 0, 0], [0, 1, 0], [0, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]]).bool()
    assert torch.equal(self_mask(real, 3)[:, 0] == 0, want)
    assert torch.equal(self_mask(real, 1)[:, 0] == 0, want[:, 2:]), "the newest query, the others being in the cache"


def test_cross_attention_is_not_causal():
    model, images = tiny(), pictures(1)
    tokens = words(1, 1, 5)
    _, attn = model(images, tokens, return_attn=True)
    assert attn["cross"][:, :, :, 0].min() > 0, "the first word must see every patch"
    vision = model.encode(images).detach().requires_grad_()
    model.decode(vision, tokens)[0, 0, 0].square().sum().backward()
    assert (vision.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("attention", ["hand", "fast"])
def test_padding_changes_nothing(attention):
    model, images = tiny(attention=attention), pictures(2)
    lengths = [4, 7, 1, 6]
    right = padded(lengths).view(2, 2, 7)
    left = torch.stack([row.roll(7 - n) for row, n in zip(right.view(4, 7), lengths)]).view(2, 2, 7)
    wide = F.pad(right, (2, 3))
    a, b, c = (model(images, tokens).flatten(0, 1) for tokens in (right, left, wide))
    for i, n in enumerate(lengths):
        alone = model(images[i // 2:i // 2 + 1], right.view(4, 7)[i:i + 1, :n])[0]
        for other in (a[i, :n], b[i, 7 - n:], c[i, 2:2 + n]):
            close(alone, other)


def test_row_of_padding_only():
    for attention in ("hand", "fast"):
        model = tiny(attention=attention)
        tokens = padded([5, 0, 3])[None]
        logits = model(pictures(1), tokens)
        assert logits.isfinite().all()
        logits.sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_packing_goes_there_and_back():
    real = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1]]).bool()
    packing = Packing(real.flatten().nonzero()[:, 0], 3, 4)
    x = torch.arange(12.0).view(3, 4, 1)
    assert packing.unpad(x).flatten().tolist() == [0, 1, 2, 4, 10, 11]
    assert torch.equal(packing.pad(packing.unpad(x)), x * real[..., None])


# ---- model: attention ----
def test_attention_rows_sum_to_one_and_skip_padding():
    model = tiny()
    for left in (False, True):
        tokens = padded([4, 7, 2, 6], left).view(2, 2, 7)
        real = (tokens != 0).view(4, 7)
        _, attn = model(pictures(2), tokens, return_attn=True)
        close(attn["vision"].sum(-1), torch.ones(2, 2, 2, 16))
        own, cross = attn["self"].transpose(2, 3)[:, real], attn["cross"].transpose(2, 3)[:, real]
        close(own.sum(-1), torch.ones(2, 19, 4))
        close(cross.sum(-1), torch.ones(2, 19, 4))
        pad_keys = ~real[:, None].expand(4, 7, 7)[real]                           # (M, S)
        assert (own * pad_keys[None, :, None]).max() == 0
        assert attn["cross"].transpose(2, 3)[:, ~real].abs().max() == 0


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_hand_and_fast_attention_agree(kv_heads):
    torch.manual_seed(0)
    hand = Attention(16, 4, kv_heads, 8, bias=False, path="hand")
    fast = Attention(16, 4, kv_heads, 8, bias=False, path="fast")
    fast.load_state_dict(hand.state_dict())
    x, source = torch.randn(3, 5, 16, requires_grad=True), torch.randn(3, 9, 16)
    mask = self_mask(padded([5, 3, 4]) != 0, 5)
    for keys, bias in ((x, mask), (source, None)):
        a, b = (m(x, *m.keys_values(keys), bias) for m in (hand, fast))
        close(a, b)
        close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (a, b)), 1e-4)
    models = [tiny(attention=path, text_kv_heads=kv_heads) for path in ("hand", "fast")]
    tokens = padded([4, 7, 2, 6]).view(2, 2, 7)
    close(*(m(pictures(2), tokens) for m in models))


def test_grouped_queries_equal_repeated_heads():
    torch.manual_seed(0)
    few, many = Attention(16, 4, 2, 8, bias=False, path="hand"), Attention(16, 4, 4, 8, bias=False, path="hand")
    state = few.state_dict()
    state["kv.weight"] = state["kv.weight"].view(2, 2, 8, 16).repeat_interleave(2, dim=1).reshape(64, 16)
    many.load_state_dict(state)
    x, collected = torch.randn(2, 5, 16), ([], [])
    close(*(m(x, *m.keys_values(x), collect=c) for m, c in zip((few, many), collected)))
    close(collected[0][0], collected[1][0])
    q, k, v = torch.randn(1, 8, 5, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    close(F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
          F.scaled_dot_product_attention(q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)))


def test_attention_equals_the_formula():
    torch.manual_seed(0)
    layer, x = Attention(16, 4, 2, 8, bias=True), torch.randn(2, 5, 16)
    q = layer.q(x).view(2, 5, 4, 8).transpose(1, 2)
    k, v = (t.repeat_interleave(2, 1) for t in layer.keys_values(x))
    weights = (q @ k.transpose(2, 3) / math.sqrt(8)).softmax(-1)
    close(layer(x, *layer.keys_values(x)), layer.out((weights @ v).transpose(1, 2).reshape(2, 5, 32)))


def test_rope_depends_on_relative_positions_only():
    cos, sin = rope_tables(40, 8, 10000.0)
    q, k = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    at = lambda x, position: rotate(x, (cos[position][None, None], sin[position][None, None]))      # noqa: E731
    score = lambda i, j: (at(q, i) * at(k, j)).sum()                                                # noqa: E731
    close(score(9, 4), score(35, 30))
    close(at(q, 17).norm(), q.norm())
    assert (score(9, 4) - score(9, 5)).abs() > 1e-3
    angle = 3 * 10000 ** (-2 / 8)         # position 3, second of the 4 pairs, (1, 5) as halves are split
    close(at(q, 3)[0, 0, 1], q[0, 0, 1] * math.cos(angle) - q[0, 0, 5] * math.sin(angle))


def test_self_attention_depends_on_relative_positions_only():
    torch.manual_seed(0)
    layer, x, packing = Attention(16, 4, 2, 8, bias=False), torch.randn(5, 16), Packing(torch.arange(5), 1, 5)
    tables, mask = rope_tables(40, 8, 10000.0), self_mask(torch.ones(1, 5).bool(), 5)

    def run(positions):
        rope = [table[positions][:, None] for table in tables]
        return layer(x, *layer.keys_values(x, rope, packing), mask, rope, packing)
    close(run(torch.arange(5)), run(torch.arange(5) + 30))
    assert (run(torch.arange(5)) - run(torch.arange(5) * 2)).abs().max() > 1e-3


def test_rms_norm():
    x, norm = torch.randn(4, 8), RMSNorm(8)
    torch.nn.init.normal_(norm.weight)
    close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight))


# ---- model: pictures and commands ----
def test_commands_together_equal_one_by_one():
    model, images, tokens = tiny(), pictures(2), padded([4, 7, 2, 6, 5, 7]).view(2, 3, 7)
    real = tokens != 0
    together, attn = model(images, tokens, return_attn=True)
    for i in range(2):
        for k in range(3):
            alone, own = model(images[i:i + 1], tokens[i:i + 1, k], return_attn=True)
            n = real[i, k].sum()
            close(together[i, k, :n], alone[0, :n])
            close(attn["cross"][:, 3 * i + k, :, :n], own["cross"][:, 0, :, :n])
    vision = model.encode(images).flip(0)
    assert (model.decode(vision, tokens) - together)[real].abs().max() > 1e-3, "each command must see its own picture"


def test_loss_equals_cross_entropy_on_all_logits():
    model, images, tokens = tiny(), pictures(2), padded([4, 7, 2, 6]).view(2, 2, 7)
    targets = torch.where((tokens != 0) & (words(2, 2, 7, seed=5) % 2 == 0), words(2, 2, 7, seed=6), -100)
    assert 3 < (targets >= 0).sum() < 18
    want = F.cross_entropy(model(images, tokens).flatten(0, 2), targets.flatten(), ignore_index=-100)
    close(model(images, tokens, targets), want)
    seen = []
    total = model(images, tokens, targets, loss_fn=lambda logits, t: seen.append(t) or logits.logsumexp(-1).sum())
    assert torch.equal(seen[0], targets[targets >= 0]), "the loss sees learned targets only"
    close(total, model(images, tokens).logsumexp(-1)[targets >= 0].sum())


def test_freezing():
    model, images, tokens = tiny(), pictures(2), words(2, 2, 5)
    for part in ("vision", "projection", "decoder"):
        model.zero_grad()
        model.freeze(part)
        model(images, tokens, tokens).backward()
        for name, p in model.named_parameters():
            assert (p.grad is None or not p.grad.any()) == name.startswith(part), name
        model.freeze(part, on=False)
    model.zero_grad()
    model(images, tokens, tokens).backward()
    assert all(p.grad.any() for p in model.parameters() if p.dim() > 1)
    with pytest.raises(ValueError, match="no part 'stem'"):
        model.freeze("stem")


def test_dropout_only_in_training():
    model, images, tokens = tiny(dropout=0.5), pictures(1), words(1, 1, 5)
    assert torch.equal(model(images, tokens), model(images, tokens))
    model.train()
    assert not torch.equal(model(images, tokens), model(images, tokens))
    model.generate(images, tokens, 2)
    assert model.training, "generate leaves the mode as it was"


def test_contrastive_loss():
    model, images = tiny(contrast_weight=0.1), pictures(3)
    assert not hasattr(tiny(), "contrast")
    tokens = padded([4, 6, 2])
    vision = model.encode(images)
    loss = model.contrastive_loss(vision, tokens)
    moved = torch.stack([row.roll(6 - n) for row, n in zip(tokens, [4, 6, 2])])
    close(model.contrastive_loss(vision, moved), loss)
    hidden = torch.stack([model.decoder(tokens[i:i + 1, :n])[0, -1] for i, n in enumerate([4, 6, 2])])
    logits = 10 * F.cosine_similarity(vision.mean(1)[:, None], hidden[None], dim=-1) - 10
    want = sum(-F.logsigmoid(logits[i, j] if i == j else -logits[i, j]) for i in range(3) for j in range(3)) / 3
    close(loss, want)
    loss.backward()
    assert all(p.grad.any() for p in model.contrast.values())


# ---- model: generation ----
def left_prompts():
    return padded([4, 7, 2, 6], left=True).view(2, 2, 7)


def greedy_by_hand(model, images, prompts, steps, eos=2):
    """Greedy decoding, one prompt after the other, without padding, cache or batch."""
    out = torch.zeros(*prompts.shape[:2], steps, dtype=torch.long)
    for i, k in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
        text = prompts[i, k][prompts[i, k] != 0]
        for step in range(steps):
            logits = model(images[i:i + 1], text[None])[0, -1]
            out[i, k, step] = logits[1:].argmax() + 1
            text = torch.cat((text, out[i, k, step:step + 1]))
            if out[i, k, step] == eos:
                break
    return out


@torch.no_grad()
def test_cached_decoding_equals_recomputing():
    model, images, prompts = tiny(), pictures(2), left_prompts()
    want = greedy_by_hand(model, images, prompts, 10)
    eos = want[0, 0, 3].item()            # a word that is said, so that some rows end early
    want = greedy_by_hand(model, images, prompts, 10, eos)
    assert (want == 0).any() and (want[..., -1] != 0).any(), "some rows end early, some do not"
    for use in (True, False):
        tokens, first = model.generate(images, prompts, 10, eos_id=eos, use_cache=use)
        assert torch.equal(tokens, want)
        for i in range(2):
            for k in range(2):
                row = prompts[i, k][prompts[i, k] != 0]
                close(first[i, k], model(images[i:i + 1], row[None])[0, -1])


@torch.no_grad()
def test_cache_gives_the_same_hidden_states():
    model = tiny()
    tokens, vision = padded([9, 5, 7, 8], left=True), model.encode(pictures(2))
    whole = model.decoder(tokens, vision)
    cache = model_file.Cache(2, 24)
    parts = [model.decoder(part, vision, cache) for part in tokens.split([6, 1, 1, 1], dim=1)]
    close(torch.cat(parts, 1), whole)
    assert cache.cross[0][0].shape == (2, 2, 16, 8), "keys of the 2 pictures, once for their 4 commands"


@torch.no_grad()
def test_generation_stops_when_all_have_finished():
    model, images, prompts = tiny(), pictures(1), words(1, 1, 4)
    tokens, _ = model.generate(images, prompts, 12, eos_id=-1)
    assert tokens.shape == (1, 1, 12)
    said = tokens[0, 0].tolist()
    tokens, _ = model.generate(images, prompts, 12, eos_id=said[2])
    assert tokens[0, 0].tolist() == said[:said.index(said[2]) + 1]


def log_probability(model, vision, prompt, new, eos):
    """Mean log-probability of the new tokens up to eos, [PAD] never being said."""
    text = torch.tensor([prompt + new])
    logits = model.decode(vision, text)[0, len(prompt) - 1:-1]
    logits[:, 0] = -math.inf
    n = new.index(eos) + 1 if eos in new else len(new)
    return logits.log_softmax(-1)[range(n), new[:n]].sum().item() / n


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_beam_search_equals_brute_force_on_two_steps(use_cache):
    model, images, prompts = tiny(), pictures(1), words(1, 2, 4)
    model.decoder.embedding.weight *= 3                           # sharper, for clear differences
    vision, eos = model.encode(images), 2
    tokens, _ = model.generate(images, prompts, 2, beam=V, eos_id=eos, use_cache=use_cache)
    for k in range(2):
        prompt = prompts[0, k].tolist()
        every = [[eos]] + [[a, b] for a in range(1, V) if a != eos for b in range(1, V)]
        rows = torch.tensor([prompt + [a] for a in range(1, V)])
        step1 = model.decode(vision, torch.tensor([prompt]))[0, -1]
        step2 = model.decode(vision, rows[None])[0, :, -1]
        step1[0] = step2[:, 0] = -math.inf
        step1, step2 = step1.log_softmax(-1), step2.log_softmax(-1)
        score = lambda s: step1[eos] if len(s) == 1 else (step1[s[0]] + step2[s[0] - 1, s[1]]) / 2      # noqa: E731
        best = max(every, key=score)
        assert tokens[0, k].tolist()[:len(best)] == best


@torch.no_grad()
def test_beam_search_is_not_worse_than_greedy():
    model, images, prompts = tiny(), pictures(2), left_prompts()
    for p in model.decoder.blocks.parameters():
        p *= 3                            # an untrained model repeats its input; stronger blocks make it say more
    vision = model.encode(images)
    greedy, first = model.generate(images, prompts, 6, beam=1)
    beams, first_beams = model.generate(images, prompts, 6, beam=4)
    again, _ = model.generate(images, prompts, 6, beam=4, use_cache=False)
    assert torch.equal(beams, again) and torch.equal(first, first_beams)
    assert not torch.equal(greedy, beams[..., :greedy.shape[-1]]), "a case where beams matter"
    score = [0.0, 0.0]
    for i, k in ((0, 0), (0, 1), (1, 0), (1, 1)):
        prompt = prompts[i, k][prompts[i, k] != 0].tolist()
        for which, tokens in enumerate((greedy, beams)):
            score[which] += log_probability(model, vision[i:i + 1], prompt, tokens[i, k].tolist(), 2)
    assert score[1] > score[0], "no single prompt is sure to gain, but together they do"


# ---- model: parameters, precision, learning ----
def test_parameter_counts():
    model = tiny()
    model.freeze("vision")
    counts, memory = model_file.parameter_stats(model)
    total = sum(p.numel() for p in model.parameters())
    vision = sum(p.numel() for p in model.vision.parameters())
    assert counts["total"] == (total, total - vision) and counts["vision"] == (vision, 0)
    assert sum(counts[part][0] for part in ("vision", "projection", "decoder")) == total
    assert memory["AdamW state"] == pytest.approx(8 * (total - vision) / 2 ** 20)


@pytest.mark.parametrize("preset", sorted(config.PRESETS))
def test_presets_stay_under_50m_parameters(preset):
    with torch.device("meta"):
        model = VLM(config.from_args([f"--preset={preset}"]), 500)
    assert sum(p.numel() for p in model.parameters()) < 50e6


def test_initial_sizes():
    torch.manual_seed(0)
    cfg = config.from_args([], image_size=64)
    model = VLM(cfg, 300)
    close(model.decoder.blocks[0].attn.q.weight.std(), torch.tensor(128 ** -0.5), 2e-3)
    close(model.decoder.blocks[0].ffn.down.weight.std(), torch.tensor(256 ** -0.5 / math.sqrt(12)), 2e-3)
    close(model.vision.blocks[0].down.weight.std(), torch.tensor(512 ** -0.5 / math.sqrt(8)), 2e-3)
    close(model.decoder.embedding.weight.std() * math.sqrt(128), torch.tensor(1.0), 2e-2)
    assert 0.2 < model.features(pictures(2, 64))["stem"].std() < 2


def test_overfits_one_batch():
    model = tiny().train()
    images, tokens = pictures(4), words(4, 2, 8)
    tokens[:, :, :4] = words(1, 1, 4, seed=9)             # the same command: only the picture tells the answers apart
    tokens[:, 1] = tokens[:, 0]
    targets = tokens.roll(-1, -1)
    targets[:, :, -1] = targets[:, :, :3] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        loss = model(images, tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.05:
            break
    assert loss < 0.05
    blank = model(torch.zeros_like(images), tokens, targets)
    assert blank > 1, "without its picture the answer cannot be known"


def test_bfloat16_autocast():
    model = tiny().train()
    images, tokens = pictures(2), padded([4, 7, 2, 6]).view(2, 2, 7)
    targets = torch.where(tokens != 0, tokens, -100)
    exact = model(images, tokens, targets)
    for attention in ("hand", "fast"):
        for block in [*model.vision.blocks, *model.decoder.blocks]:
            block.attn.path = attention
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(images, tokens, targets)
            generated, first = model.generate(images, left_prompts(), 4, beam=2)
        model.zero_grad()
        loss.backward()
        assert loss.dtype == torch.float32 and abs(loss - exact) < 0.05 * exact
        assert first.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


def test_state_dict_round_trip(tmp_path):
    model = tiny()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    torch.manual_seed(1)
    other = VLM(model.cfg, V).eval()
    assert not torch.equal(other(pictures(1), words(1, 4)), model(pictures(1), words(1, 4)))
    other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True), strict=True)
    assert torch.equal(other(pictures(1), words(1, 4)), model(pictures(1), words(1, 4)))


def test_pick_device():
    assert model_file.pick_device(config.from_args([], device="cpu")) == torch.device("cpu")
    for wish in ("cuda:99", "mps:7", "toaster"):
        with pytest.raises(UserError, match=wish):
            model_file.pick_device(config.from_args([], device=wish))


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tiny(contrast_weight=0.1)
        images, tokens = pictures(1), words(1, 2, 5)
        model(images, tokens, tokens).backward()
        model.generate(images, tokens, 3, beam=2)


# ---- model: facts about torch that the code relies on ----
def test_causal_flag_on_cross_attention_hides_patches():
    q, k, v = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8)
    close(F.scaled_dot_product_attention(q, k, v, is_causal=True)[0, 0, 0], v[0, 0, 0])


def test_fully_masked_row():
    q, k, v = torch.randn(3, 1, 1, 2, 4)
    mask = torch.tensor([[True, False], [False, False]])
    assert F.scaled_dot_product_attention(q, k, v, mask)[0, 0, 1].abs().max() == 0
    assert torch.full((2,), -math.inf).softmax(-1).isnan().all(), "by hand it is 0/0"


def test_python_facts():
    assert (torch.device("cuda") == "cuda") is False
    assert bool("False") is True


# ---- model: parity with Hugging Face, where transformers is installed ----
def copy_linear(target, *sources):
    """Weights (and biases) of one or more HF linear layers, stacked, into ours."""
    target.weight.copy_(torch.cat([s.weight for s in sources]))
    if target.bias is not None:
        target.bias.copy_(torch.cat([s.bias for s in sources]))


@torch.no_grad()
def test_vision_encoder_equals_hf_siglip():
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = hf.SiglipVisionModel(hf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        vision_use_head=False)).eval()
    theirs = getattr(theirs, "vision_model", theirs)
    for p in theirs.parameters():
        p.add_(torch.randn_like(p) * 0.1)                         # so that no bias is 0 and no norm the identity
    ours = tiny(stem="patch", vision_layers=2).vision
    ours.stem.load_state_dict(theirs.embeddings.patch_embedding.state_dict())
    ours.positions.copy_(theirs.embeddings.position_embedding.weight)
    for mine, their in zip(ours.blocks, theirs.encoder.layers):
        mine.norm1.load_state_dict(their.layer_norm1.state_dict())
        mine.norm2.load_state_dict(their.layer_norm2.state_dict())
        copy_linear(mine.attn.q, their.self_attn.q_proj)
        copy_linear(mine.attn.kv, their.self_attn.k_proj, their.self_attn.v_proj)
        copy_linear(mine.attn.out, their.self_attn.out_proj)
        copy_linear(mine.up, their.mlp.fc1)
        copy_linear(mine.down, their.mlp.fc2)
    ours.norm.load_state_dict(theirs.post_layernorm.state_dict())
    a, b = ours(pictures(2)), theirs(pictures(2)).last_hidden_state
    print(f"\nSigLIP: largest difference {(a - b).abs().max():.1e} of values up to {b.abs().max():.1f}")
    assert (a - b).abs().max() < 1e-4


@torch.no_grad()
def test_decoder_equals_hf_gemma():
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = hf.GemmaForCausalLM(hf.GemmaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=24, pad_token_id=0)).eval()
    for p in theirs.parameters():
        p.add_(torch.randn_like(p) * 0.1)
    ours = tiny().decoder
    ours.embedding.weight.copy_(theirs.model.embed_tokens.weight)
    for mine, their in zip(ours.blocks, theirs.model.layers):
        mine.norm1.weight.copy_(their.input_layernorm.weight)
        mine.norm3.weight.copy_(their.post_attention_layernorm.weight)
        copy_linear(mine.attn.q, their.self_attn.q_proj)
        copy_linear(mine.attn.kv, their.self_attn.k_proj, their.self_attn.v_proj)
        copy_linear(mine.attn.out, their.self_attn.o_proj)
        copy_linear(mine.ffn.gate_up, their.mlp.gate_proj, their.mlp.up_proj)
        copy_linear(mine.ffn.down, their.mlp.down_proj)
    ours.norm.weight.copy_(theirs.model.norm.weight)
    for tokens in (words(3, 9), padded([9, 5, 7]), padded([9, 5, 7], left=True)):
        real = tokens != 0
        a = ours.logits(ours(tokens))
        b = theirs(tokens, attention_mask=real.long(), position_ids=(real.cumsum(1) - 1).clamp(min=0)).logits
        difference = (a - b)[real].abs().max()
        print(f"\nGemma: largest difference {difference:.1e} of values up to {b[real].abs().max():.1f}")
        assert difference < 1e-4
