"""Orthrus in vLLM under Ray Serve: serve run deploy.vllm_ray_serve:app (not run by us).

Needs ray[serve,llm] in the environment of the extra `vllm`; the folder of `orthrus export vllm` on each node.
"""

from ray.serve.llm import LLMConfig, build_openai_app

from orthrus.integrations.vllm.names import engine_arguments

app = build_openai_app(
    {
        "llm_configs": [
            LLMConfig(
                model_loading_config={"model_id": "served", "model_source": "/models/served"},
                deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 4}},
                engine_kwargs={"tensor_parallel_size": 1, **engine_arguments(7, "cuda")},
            )
        ]
    }
)
