// Executes Go templates on JSON data: stdin is a list of {"template": …, "data": …}, stdout the list of texts.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type task struct {
	Template string         `json:"template"`
	Data     map[string]any `json:"data"`
}

func main() {
	var tasks []task
	if err := json.NewDecoder(os.Stdin).Decode(&tasks); err != nil {
		panic(err)
	}
	texts := make([]string, len(tasks))
	for i, one := range tasks {
		// The option is Ollama's own.
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(one.Template))
		var text strings.Builder
		if err := parsed.Execute(&text, one.Data); err != nil {
			panic(err)
		}
		texts[i] = text.String()
	}
	if err := json.NewEncoder(os.Stdout).Encode(texts); err != nil {
		panic(err)
	}
}
