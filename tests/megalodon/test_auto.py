"""At home in transformers: Auto classes, pipelines, devices, vocabularies, outputs."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, pipeline

from megalodon import MegalodonConfig, MegalodonTokenizer
from megalodon.ops import chunk_attention
from megalodon.ops.timestep_norm import StepCounts

from .models import CHUNK, tiny_config, tiny_model

quiet = pytest.mark.usefixtures("no_warnings")

IDS = torch.randint(0, 256, (2, 2 * CHUNK + 3), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    """A saved model with its tokenizer."""
    tiny_model().save_pretrained(tmp_path)
    MegalodonTokenizer().save_pretrained(tmp_path)
    return tmp_path


def generated(model, ids, **options):
    return model.generate(ids, max_new_tokens=CHUNK + 2, do_sample=False, **options)


class TestAutoClasses:
    def test_config_answers_to_the_common_names(self):
        config = tiny_config()
        assert config.hidden_size == config.model_dim == 32
        assert config.num_hidden_layers == config.num_layers == 2
        assert config.num_attention_heads == config.num_heads == 2
        assert config.intermediate_size == config.ffn_hidden_dim == 40
        common = MegalodonConfig(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=100
        )
        assert (common.model_dim, common.num_layers, common.num_heads) == (64, 3, 4)
        assert common.ffn_hidden_dim == 100
        common.hidden_size = 96
        assert common.model_dim == 96


class TestPipeline:
    @quiet
    def test_continues_a_prompt(self, folder):
        generate = pipeline("text-generation", str(folder))
        assert type(generate.tokenizer) is MegalodonTokenizer
        text = "Göttingen is"
        found = generate(text, max_new_tokens=CHUNK + 2, do_sample=False)[0]["generated_text"]
        ids = torch.tensor([list(text.encode())])
        new = generated(tiny_model(), ids)[0, ids.shape[1] :]
        assert found == text + MegalodonTokenizer().decode(new)
        torch.manual_seed(0)
        several = generate(
            text, max_new_tokens=4, num_return_sequences=3, do_sample=True, min_p=0.05, top_k=0
        )
        assert len({one["generated_text"] for one in several}) > 1

    @quiet
    def test_a_batch_of_unequal_prompts_gives_what_each_gives(self, folder):
        generate = pipeline("text-generation", str(folder))
        prompts = ["a", "Once upon a time", "the sea"]
        options = {"max_new_tokens": CHUNK + 2, "do_sample": False}
        together = generate(prompts, batch_size=3, **options)
        assert together == [generate(prompt, **options) for prompt in prompts]

    @quiet
    def test_stops_at_a_string_and_takes_chats(self, folder):
        generate = pipeline("text-generation", str(folder))
        options = {"do_sample": False, "suppress_tokens": list(range(128, 256))}
        new = generate("x", max_new_tokens=12, return_full_text=False, **options)
        stop = new[0]["generated_text"][4]
        cut = generate(
            "x", max_new_tokens=12, return_full_text=False, stop_sequence=stop, **options
        )
        assert cut[0]["generated_text"] == new[0]["generated_text"].split(stop)[0] + stop
        generate.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        chat = generate([{"role": "user", "content": "x"}], max_new_tokens=12, **options)
        assert chat[0]["generated_text"][-1]["content"] == new[0]["generated_text"]


class TestDevices:
    @quiet
    @torch.no_grad()
    def test_device_map_auto_loads_what_fits(self, folder):
        model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
        assert torch.equal(model.cpu()(IDS).logits, tiny_model()(IDS).logits)

    @torch.no_grad()
    @pytest.mark.parametrize("tied", [True, False])
    def test_layers_on_disk_give_the_same(self, tmp_path, tied):
        model = tiny_model(tie_word_embeddings=tied)
        model.save_pretrained(tmp_path)
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        places |= {"model.final_norm": "disk", "lm_head": "cpu" if tied else "disk"}
        offloaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map=places, offload_folder=tmp_path / "offloaded"
        )
        assert {p.device.type for p in offloaded.model.layers[1].parameters()} == {"meta"}
        assert torch.equal(offloaded(IDS).logits, model(IDS).logits)
        assert torch.equal(generated(offloaded, IDS), generated(model, IDS))
        mask = torch.ones_like(IDS)
        mask[0, :5] = 0
        expected = generated(model, IDS, attention_mask=mask)
        assert torch.equal(generated(offloaded, IDS, attention_mask=mask), expected)

    @torch.no_grad()
    def test_offloading_to_the_cpu_gives_the_same(self):
        from accelerate import cpu_offload

        model = cpu_offload(tiny_model(), execution_device=torch.device("cpu"))
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert torch.equal(model(IDS).logits, tiny_model()(IDS).logits)
        assert torch.equal(generated(model, IDS), generated(tiny_model(), IDS))

    def test_no_block_is_ever_split(self):
        from accelerate import infer_auto_device_map

        model = tiny_model(num_layers=6, tie_word_embeddings=False)
        block = sum(p.nbytes for p in model.model.layers[0].parameters())
        places = infer_auto_device_map(
            model,
            max_memory={"cpu": 4 * block, "disk": 10**9},
            no_split_module_classes=list(model._no_split_modules),
        )
        layers = {name: place for name, place in places.items() if "layers" in name}
        assert sorted(layers) == [f"model.layers.{i}" for i in range(6)]
        assert set(layers.values()) == {"cpu", "disk"}

    @pytest.mark.parametrize("packed", [False, True])
    def test_what_blocks_share_follows_them_to_their_device(self, packed):
        from accelerate.utils import send_to_device

        seen = []
        model = tiny_model()
        model.model.layers[0].register_forward_hook(lambda _, args, __: seen.append(args[2]))
        model(IDS, position_ids=torch.zeros_like(IDS) if packed else None)
        layout = seen[0]
        assert send_to_device(layout, "cpu") is layout
        moved = send_to_device(layout, "meta")
        parts = [(layout, moved), (layout.segments, moved.segments)]
        tensors = 0
        for before, after in parts[: 1 + packed]:
            for name, value in vars(before).items():
                if isinstance(value, Tensor):
                    tensors += 1
                    assert getattr(after, name).device.type == "meta"
                elif isinstance(value, StepCounts):
                    assert all(each.device.type == "meta" for each in getattr(after, name))
                elif name != "segments":
                    assert getattr(after, name) == value
        assert tensors > 10 * packed

    @pytest.mark.cuda
    @torch.no_grad()
    def test_blocks_on_two_devices_give_the_same(self):
        from accelerate import dispatch_model

        model = tiny_model(num_layers=3)
        places = {"model.embed_tokens": "cpu", "model.layers.0": 0}
        places |= {"model.layers.1": "cpu", "model.layers.2": 0, "model.final_norm": 0}
        places |= {"lm_head": "cpu"}
        split = dispatch_model(tiny_model(num_layers=3), places, main_device="cpu")
        mask = torch.ones_like(IDS)
        mask[0, :5] = 0
        for extra in ({}, {"attention_mask": mask}):
            # Two devices' kernels sum in different orders.
            found, expected = split(IDS, **extra).logits, model(IDS, **extra).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
            assert torch.equal(generated(split, IDS, **extra), generated(model, IDS, **extra))


class TestVocabulary:
    @torch.no_grad()
    @pytest.mark.parametrize("tied", [True, False])
    def test_new_tokens_leave_the_old_as_they_were(self, tmp_path, tied):
        model = tiny_model(tie_word_embeddings=tied)
        logits = model(IDS).logits
        cache = model(IDS[:, :5]).cache
        model.resize_token_embeddings(300)
        further = model(IDS[:, 5:], cache=cache).logits[..., :256]  # a state holds no vocabulary
        torch.testing.assert_close(further, logits[:, 5:], rtol=0, atol=1e-5)
        assert model.config.vocab_size == model.vocab_size == 300
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
        torch.testing.assert_close(model(IDS).logits[..., :256], logits, rtol=0, atol=1e-6)
        assert model(torch.tensor([[299]])).logits.shape == (1, 1, 300)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        with pytest.raises(ValueError, match="outside the vocabulary of 300"):
            model(torch.tensor([[300]]))


class TestOutputs:
    @quiet
    @torch.no_grad()
    def test_hidden_states_run_from_the_embedding_to_the_last_norm(self):
        model = tiny_model()
        output = model(IDS, output_hidden_states=True)
        states = output.hidden_states
        assert len(states) == model.config.num_layers + 1
        assert torch.equal(states[0], model.model.embed_tokens(IDS))
        assert torch.equal(model.lm_head(states[-1]), output.logits)
        assert torch.equal(model.get_decoder()(IDS).last_hidden_state, states[-1])
        assert model(IDS).hidden_states is None

    @torch.no_grad()
    def test_the_config_may_ask_for_them(self):
        model = tiny_model(output_hidden_states=True)
        assert len(model(IDS).hidden_states) == 3
        assert model(IDS, output_hidden_states=False).hidden_states is None

    @quiet
    @torch.no_grad()
    def test_tuples_hold_the_same(self):
        model = tiny_model()
        expected = model(IDS, labels=IDS, use_cache=False)
        for found in (
            model(IDS, labels=IDS, use_cache=False, return_dict=False),
            tiny_model(return_dict=False)(IDS, labels=IDS, use_cache=False),
        ):
            assert isinstance(found, tuple)
            assert torch.equal(found[0], expected.loss)
            assert torch.equal(found[1], expected.logits)
        assert isinstance(model.model(IDS, return_dict=False), tuple)

    def test_attention_maps_are_refused(self):
        for model in (tiny_model(), tiny_model().model):
            with pytest.raises(ValueError, match="no attention maps"):
                model(IDS, output_attentions=True)


class TestAttentionImplementation:
    @quiet
    @torch.no_grad()
    def test_eager_and_sdpa_are_served(self, folder, monkeypatch):
        monkeypatch.setattr(chunk_attention, "SCORES_LIMIT", 0)  # from 1 on, the fused kernel
        logits = [
            AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name)(IDS).logits
            for name in ("eager", "sdpa")
        ]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("name", ["nonsense", "flash_attention_2", "flex_attention"])
    def test_what_no_model_of_its_kind_has_is_refused_at_once(self, folder, name):
        with pytest.raises(ValueError, match=r"(?i)attn_implementation|flash attention"):
            AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name)
        with pytest.raises(ValueError, match=r"(?i)attn_implementation|flash attention"):
            tiny_model().set_attn_implementation(name)

    def test_what_transformers_lets_pass_is_refused_at_the_first_call(self, folder):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="paged|eager")
        with pytest.raises(ValueError, match=r"'sdpa', the default, or 'eager'"):
            model(IDS)


def test_embeddings_of_the_wrong_shape_are_refused():
    for shape in [(2, 32), (2, 0, 32), (2, 5, 31)]:
        with pytest.raises(ValueError, match="inputs_embeds has shape"):
            tiny_model()(inputs_embeds=torch.zeros(shape))
