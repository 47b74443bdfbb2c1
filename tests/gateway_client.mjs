// What the official Node client makes of a gateway, as one line of JSON. Arguments: URL and key of one that serves `tiny`, and of
// one that serves embeddings as `stub`.
import OpenAI from "openai";

const [baseURL, apiKey, embedURL, embedKey] = process.argv.slice(2);
const model = "tiny";
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "What is the weather in Rome?" }];
const tools = [
  {
    type: "function",
    function: {
      name: "weather",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];

async function streamed(options) {
  let text = "";
  let finish = "";
  let usage = null;
  const stream = await client.chat.completions.create({ model, messages, stream: true, max_tokens: 6, ...options });
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    finish = chunk.choices[0]?.finish_reason ?? finish;
    usage = chunk.usage ?? usage;
  }
  return { text, finish, usage: usage?.completion_tokens ?? null };
}

async function failure(work) {
  try {
    await work;
    return null;
  } catch (e) {
    return { class: e.constructor.name, status: e.status, code: e.code, retryAfter: e.headers?.get?.("retry-after") ?? null };
  }
}

const whole = await client.chat.completions.create({ model, messages, max_tokens: 6 });
const called = await client.chat.completions.create({ model, messages, tools, tool_choice: "required" });
const responded = await client.responses.create({ model, input: "hello", max_output_tokens: 6 });
let events = [];
for await (const event of await client.responses.create({ model, input: "hello", max_output_tokens: 6, stream: true })) {
  events.push(event.type);
}
const embedder = new OpenAI({ baseURL: embedURL, apiKey: embedKey });
const embedded = await embedder.embeddings.create({ model: "stub", input: ["a", "b"], encoding_format: "float" });
const models = [];
for await (const found of client.models.list()) models.push(found.id);
const stranger = new OpenAI({ baseURL, apiKey: "mk-wrong", maxRetries: 0 });

const left = await client.chat.completions.create({ model, messages, stream: true, max_tokens: 400 });
for await (const _ of left) break; // leaves: the SDK aborts the request

console.log(
  JSON.stringify({
    text: whole.choices[0].message.content,
    tokens: whole.usage.completion_tokens,
    tool: called.choices[0].message.tool_calls[0].function.name,
    plain: await streamed({}),
    counted: await streamed({ stream_options: { include_usage: true } }),
    responded: responded.output_text,
    events: [events[0], events.at(-1)],
    vectors: embedded.data.length,
    models,
    unauthorized: await failure(stranger.models.list()),
    missing: await failure(client.chat.completions.create({ model: "gpt-4", messages })),
    wrong: await failure(client.chat.completions.create({ model, messages, temperature: -3 })),
  }),
);
